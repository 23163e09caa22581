"""Means of directions: each tensor counts as one vector, and inner products are all that is needed of it.

The mathematics happens in the space of coefficients, on a [models, models] matrix in float64; what is left for the
tensors is one weighted sum.
"""

import math
from typing import TYPE_CHECKING, Annotated, Any

from graftkit.methods import PerModel, Range, method
from graftkit.methods.parts import per_model, weighted_sum

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Weight = Annotated[PerModel, Range(search=(0, 1))]

CANCELLED = 1e-7  # length of a mean of unit vectors below which it has no direction: rounding is about 1e-8
STRAIGHT = 1e-7  # squared sine of an angle below which the arc is its chord
ITERATIONS = 100
CONVERGED = 1e-12


@method(
    source="Jang et al. 2024, Model Stock: All we need is just a few fine-tuned models (arXiv 2403.19522)",
    grain="element",
    rotations="both",
    model_count=(2, None),
    kernel="graftkit.methods.kernels:model_stock",
)
def model_stock(deltas: "Tensor", dots: "Tensor") -> "Tensor":
    """Mean of the models, drawn back towards the base by as much as they disagree.

    Formula: `t * mean_t delta_t` with `t = T c / (1 + (T - 1) c)`, where c is the mean cosine of all pairs of the T
    deltas; t lies between 0 (the base) and 1 (the mean).

    Shapes: deltas [models, *shape], dots [models, models] -> merged delta [*shape].

    Knobs: none; the angles decide.

    Source: Jang et al. 2024 (arXiv 2403.19522), layer-wise; the formula for N models.

    Deviations: a negative mean cosine gives the base (the formula would step past it, away from all models); a pair
    with a zero delta counts as a right angle; no norm is too small (mergekit 0.1.5 has a floor of 1e-6 on products).
    """
    share = stock_share(dots.cpu().numpy())
    return weighted_sum(deltas, [float(share) / len(deltas)] * len(deltas))


@method(
    source="Jang et al. 2024, Model Stock: All we need is just a few fine-tuned models (arXiv 2403.19522)",
    grain="row",
    model_count=(2, None),
)
def model_stock_rows(deltas: "Tensor") -> "Tensor":
    """Model Stock for each output channel by itself.

    Formula: as `model_stock`, with the cosines of the same row of all deltas.

    Shapes: deltas [models, out, ...] -> merged delta [out, ...]; a vector is one row.

    Knobs: none; the angles decide.

    Source: Jang et al. 2024 (arXiv 2403.19522), filter-wise; mergekit's `filter_wise: true`.

    Deviations: as `model_stock`.
    """
    import torch

    rows = deltas.flatten(2) if deltas.ndim > 2 else deltas.reshape(len(deltas), 1, -1)
    wide = rows.detach().to(torch.float64).transpose(0, 1)  # [out, models, in]
    share = torch.from_numpy(stock_share((wide @ wide.transpose(1, 2)).cpu().numpy()))
    mean = weighted_sum(rows, 1 / len(deltas))
    return (share.to(mean)[:, None] * mean).reshape(deltas.shape[1:])


def stock_share(dots: "np.ndarray") -> "np.ndarray":
    """How far to go from the base to the mean of the models; dots [..., models, models] -> [...]."""
    import numpy as np

    count = dots.shape[-1]
    norms = np.sqrt(np.diagonal(dots, axis1=-2, axis2=-1))
    scales = norms[..., :, None] * norms[..., None, :]
    cosines = dots / np.where(scales > 0, scales, 1.0)
    pairs = np.triu_indices(count, 1)
    cosine = np.clip(cosines[..., pairs[0], pairs[1]].mean(axis=-1), 0.0, 1.0)
    return count * cosine / (1 + (count - 1) * cosine)  # type: ignore[no-any-return]


@method(
    source="Karcher 1977, Riemannian center of mass and mollifier smoothing; as mergekit uses it on whole tensors",
    grain="element",
    rotations="both",
    base_optional=True,
    kernel="graftkit.methods.kernels:karcher",
)
def karcher(deltas: "Tensor", dots: "Tensor") -> "Tensor":
    """Mean on the sphere: the direction from which the angles to all models are least, with their mean norm.

    Formula: `mean_t |W_t| * mu` with the unit vector mu that has the least sum of squared angles to `W_t / |W_t|`;
    iterated from their normalised mean.

    Shapes: deltas [models, *shape], dots [models, models] -> [*shape]; the models themselves without a base.

    Knobs: none; all models count alike.

    Source: Karcher 1977; mergekit 0.1.5, method `karcher`.

    Deviations: with a base it works on deltas (mergekit ignores the base; leave it out to do so here); it iterates
    until it stands still, at most 100 times (mergekit: to steps of 1e-5, at most 10); directions that cancel give the
    mean of the tensors.
    """
    return weighted_sum(deltas, karcher_factors(dots.cpu().numpy()).tolist())


def karcher_factors(dots: "np.ndarray") -> "np.ndarray":
    """The factor of each tensor in the Karcher mean of all; dots [models, models] -> [models]."""
    import numpy as np

    norms = np.sqrt(np.diagonal(dots))
    real = norms > 0  # a zero tensor has no direction, and counts in the mean norm
    units = np.where(real, 1 / np.where(real, norms, 1), 0.0)
    cosines = dots * units[:, None] * units
    point = real / max(real.sum(), 1)  # the mean direction, as coefficients of the unit vectors
    length = _length(point, cosines)
    if length <= CANCELLED:
        return np.full(len(dots), 1 / len(dots))
    point = point / length
    for _ in range(ITERATIONS):
        tangent = _tangent(point, cosines, real)
        step = _length(tangent, cosines)
        if step <= CONVERGED:
            break
        point = math.cos(step) * point + math.sin(step) / step * tangent
        point = point / _length(point, cosines)
    return norms.mean() * point * units  # type: ignore[no-any-return]


def _length(coefficients: "np.ndarray", cosines: "np.ndarray") -> float:
    return math.sqrt(max(float(coefficients @ cosines @ coefficients), 0.0))


def _tangent(point: "np.ndarray", cosines: "np.ndarray", real: "np.ndarray") -> "np.ndarray":
    """The mean of the directions, as seen from a point: where they pull it, as coefficients."""
    import numpy as np

    seen = np.clip(cosines @ point, -1.0, 1.0)
    sines = np.sqrt(1 - seen**2)
    pull = np.where(real & (sines > CANCELLED), np.arccos(seen) / np.maximum(sines, CANCELLED), 0.0) / real.sum()
    return pull - (pull @ seen) * point  # type: ignore[no-any-return]


@method(
    source="mergekit, method `multislerp`",
    grain="element",
    rotations="both",
    base_optional=True,
    kernel="graftkit.methods.kernels:multislerp",
)
def multislerp(deltas: "Tensor", dots: "Tensor", *, weight: Weight = 1.0, normalize: bool = True) -> "Tensor":
    """Weighted mean direction of any number of models, with their weighted mean norm.

    Formula: `(sum_t w_t |W_t|) * mu`, mu the unit vector along `sum_t w_t W_t / |W_t|`; `w_t = weight_t / sum weight`
    with `normalize`.

    Shapes: deltas [models, *shape], dots [models, models] -> [*shape]; the models themselves without a base.

    Knobs:
        weight: share of each model, any unit; 0 leaves a model out.
        normalize: divide the weights by their sum; without it they scale the norm too.

    Source: mergekit 0.1.5, method `multislerp`; no paper.

    Deviations: mergekit adds a step in the tangent space at mu, which is zero in exact arithmetic; here it is left out.
    Directions that cancel give the weighted mean of the tensors (mergekit refuses more than two).
    """
    weights = per_model(weight, dots).reshape(-1)
    return weighted_sum(deltas, multislerp_factors(weights, dots, normalize))


def multislerp_factors(weights: Any, dots: Any, normalize: bool) -> Any:
    """The factor of each tensor, [models]; of numpy arrays or of tensors."""
    weights = weights / weights.sum() if normalize else weights
    norms = dots.diagonal() ** 0.5
    directions = weights * (norms > 0) / (norms + (norms == 0))
    squared = abs(directions @ dots @ directions)
    if squared <= (CANCELLED * abs(weights).sum()) ** 2:
        return weights
    return directions * ((weights * norms).sum() / squared**0.5)


@method(
    source="mergekit, method `nuslerp`",
    grain="element",
    rotations="both",
    model_count=(2, 2),
    base_optional=True,
    kernel="graftkit.methods.kernels:nuslerp",
)
def nuslerp(deltas: "Tensor", dots: "Tensor", *, weight: Weight = 1.0) -> "Tensor":
    """Spherical interpolation between two models, or between their deltas, at the point that their weights name.

    Formula: SLERP at `t = weight_2 / (weight_1 + weight_2)`; the straight line where the two are parallel, opposite,
    or zero.

    Shapes: deltas [2, *shape], dots [2, 2] -> [*shape]; the models themselves without a base.

    Knobs:
        weight: share of each model, any unit; weights of either sign go beyond the end of the path.

    Source: mergekit 0.1.5, method `nuslerp` with `nuslerp_flatten: true`; no paper.

    Deviations: only whole tensors, not single rows or columns. The line is taken for a squared sine up to 1e-7
    (mergekit: 1e-16, below float32's rounding), and weights that sum to zero are refused (mergekit: the middle).
    """
    import torch

    t = second_share(per_model(weight, dots).reshape(-1))
    factors: Any = torch.stack(arc_factors(t, angle_between(dots.tolist()), torch.sin))
    return weighted_sum(deltas, factors)


def second_share(weights: Any) -> Any:
    """The second of two weights as a share of both. Raises ValueError where they sum to zero."""
    total = weights.sum()
    if abs(total) <= 1e-12 * abs(weights).sum():
        raise ValueError(f"nuslerp divides by the sum of its weights, and {weights.tolist()} sum to zero")
    return weights[1] / total


def angle_between(dots: list[list[float]]) -> float:
    """The angle between two tensors; 0 where the arc is not longer than its chord, or has no direction."""
    scale = math.sqrt(dots[0][0] * dots[1][1])
    cosine = max(-1.0, min(1.0, dots[0][1] / scale)) if scale > 0 else 1.0
    return math.acos(cosine) if 1 - cosine**2 > STRAIGHT else 0.0


def arc_factors(t: Any, angle: float, sine: Any) -> list[Any]:
    """The factors of both ends at the place t of an arc; `sine` is of the kind of t."""
    if angle == 0:
        return [1 - t, t]
    return [sine((1 - t) * angle) / math.sin(angle), sine(t * angle) / math.sin(angle)]
