"""Gates without training: what moments of the models' answers (`measuring/responses.py`) say of the best weights.

With `C_s[t, u] = E_s[(D_t x)_i (D_u x)_i]` of channel i, x from the domain of model s, domains weighed equally:

    convex   least sum_s E_s |sum_t w_t (W_t - W_s) x|^2 over weights that are not negative and sum to one
    free     least sum_s E_s |sum_t alpha_t D_t x - D_s x|^2, a ridge drawing alpha towards a prior
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

UNDECIDED = 1e-9  # of the mean square: so much draws weights that nothing decides towards equal ones
MOST = 8  # models: the weights' supports are tried one by one, and there are 2^models - 1


def convex(moments: np.ndarray) -> np.ndarray:
    """The weights of each channel, [models, out], from moments [domains, models, models, out].

    For two models `w_b = S_b / (S_b + S_g)` with `S_t = E_t[((W_b - W_g) x)_i^2]`.
    Raises ValueError for more than eight models.
    """
    models, out = moments.shape[1], moments.shape[-1]
    if models > MOST:
        raise ValueError(f"convex weights are solved for at most {MOST} models, got {models}")
    square = np.zeros((out, models, models))  # of w: w' square w is the error
    for s, own in enumerate(moments):
        apart = own - own[:, s][:, None] - own[s][None] + own[s, s]
        square += np.moveaxis(apart, -1, 0)
    scale = np.trace(square, axis1=1, axis2=2) / models
    scale = np.where(scale > 0, scale, 1.0)
    square = square / scale[:, None, None] + UNDECIDED * np.eye(models)
    best, least = np.full((out, models), 1 / models), np.full(out, np.inf)
    for size in range(1, models + 1):
        for support in map(list, combinations(range(models), size)):
            weights = np.zeros((out, models))
            weights[:, support] = _on_support(square[:, support][:, :, support])
            error = np.einsum("it,itu,iu->i", weights, square, weights)
            better = (weights >= 0).all(axis=1) & (error < least)
            best[better], least[better] = weights[better], error[better]
    return best.T


def _on_support(square: np.ndarray) -> np.ndarray:
    """The least `w' square w` of weights that sum to one, of either sign: [out, n, n] -> [out, n]."""
    raw = np.linalg.solve(square, np.ones((*square.shape[:2], 1)))[..., 0]
    return raw / raw.sum(axis=1, keepdims=True)  # type: ignore[no-any-return]


def free(moments: np.ndarray, ridge: float, prior: float) -> np.ndarray:
    """The coefficients of each channel, [models, out], from moments [domains, models, models, out].

    `ridge` is in units of the mean square of a channel's answers; a channel that answers nothing gets the prior.
    """
    models = moments.shape[1]
    gram = np.moveaxis(moments.mean(axis=0), -1, 0)  # [out, models, models]
    wanted = np.stack([sum(own[t, s] for s, own in enumerate(moments)) for t in range(models)], axis=1) / len(moments)
    scale = np.trace(gram, axis1=1, axis2=2)[:, None] / models
    pull = np.where(scale > 0, ridge * scale, 1.0)
    gram = gram + (pull + UNDECIDED * scale)[..., None] * np.eye(models)
    return np.linalg.solve(gram, (wanted + pull * prior)[..., None])[..., 0].T  # type: ignore[no-any-return]
