"""Gated fusion: each output channel of each matrix is shared out between the models by gates.

`graft_weights` is the whole of Graft's mathematics, on [models] signals and [models, out, ...] gates, of numpy or of
torch, where it is differentiable. What is left for the weights is `fuse`.
"""

import importlib
from typing import TYPE_CHECKING, Annotated, Any, Literal

from graftkit.methods import Range, method
from graftkit.methods.signals import LARGEST, SMALLEST

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = "Graft 2025 (arXiv 2506.23940)"
Gates = Literal["gates", "none"]
Signal = Literal["entropy", "spectral", "none"]
Bins = Annotated[int, Range(SMALLEST, LARGEST, search=(5, 20))]
Share = Annotated[float, Range(0, 1, search=(0.1, 0.6))]
Slope = Annotated[float, Range(0, search=(200, 600))]
Sharpness = Annotated[float, Range(0, search=(1, 50))]
Of = Literal["weights", "product", "factors"]
LOOKUPS = {"global_signal": "none", "local_signal": "none"}


def graft_weights(
    signals: Any,
    gates: Any,
    *,
    a: float = 0.4,
    c: float = 500.0,
    normaliser: str = "pi",
    sharpness: float = 1.0,
) -> Any:
    """The weight of each model in each channel, from its signal and its local gates (equations 4 to 7).

    Formula: `g_t = 1/2 + a/pi arctan(c (H_t - mean of the others' H))`, `u_t = g_t (1 - exp(-g_t l_t))`,
    `w = softmax_t(sharpness * u_t)`: at two models the paper's, with `l_b = w_local`, `l_g = 1 - w_local`.

    Shapes: signals [models], gates [models, out, ...] -> [models, out, ...]; the weights of a channel sum to one.
    """
    arrays = importlib.import_module(type(gates).__module__.partition(".")[0])  # numpy or torch, as the gates are
    share = global_gate(signals, a=a, c=c, normaliser=normaliser).reshape(-1, *[1] * (gates.ndim - 1))
    strength = sharpness * share * (1 - arrays.exp(-share * gates))
    raised = arrays.exp(strength - arrays.amax(strength, axis=0, keepdims=True))
    return raised / raised.sum(axis=0, keepdims=True)


def global_gate(signals: Any, *, a: float = 0.4, c: float = 500.0, normaliser: str = "pi") -> Any:
    """Equation 4: how much each model counts by its signal, `1/2 + a/pi arctan(c (H_t - mean of the others' H))`."""
    if normaliser == "c" and c == 0:
        raise ValueError("normaliser c divides by c, and c is 0; give c a value above 0, or normaliser pi")
    arrays = importlib.import_module(type(signals).__module__.partition(".")[0])
    others = (signals.sum() - signals) / max(len(signals) - 1, 1)
    return 0.5 + a / (arrays.pi if normaliser == "pi" else c) * arrays.arctan(c * (signals - others))


def equal_gates(gates: Any) -> Any:
    """Gates that prefer no model, in the shape of some: `1 / models`."""
    return 0 * gates + 1 / len(gates)


def fuse(stack: "Tensor", weights: "Tensor") -> "Tensor":
    """`sum_t w_t W_t` for weights that sum to one, as `W_1 + sum_t w_t (W_t - W_1)`: exact where all models agree.

    Shapes: stack [models, *shape], weights [models, out or 1, in or 1] -> [*shape].
    """
    rows = weights.shape[1]
    flat = stack.reshape(len(stack), rows, stack[0].numel() // max(rows, 1))
    return _fused(flat, weights.to(stack.dtype)).reshape(stack.shape[1:])


def _fused(flat: "Tensor", weights: "Tensor") -> "Tensor":
    total = flat[0].clone()
    for t in range(1, len(flat)):
        total = total + weights[t] * (flat[t] - flat[0])
    return total


def _graft_shares(
    signals: Any, gates: Any, a: float, c: float, normaliser: str, local_signal: str, sharpness: float
) -> Any:
    chosen = gates if local_signal == "gates" else equal_gates(gates)
    return graft_weights(signals, chosen, a=a, c=c, normaliser=normaliser, sharpness=sharpness)


def _convex_shares(gates: Any, local_signal: str) -> Any:
    return gates if local_signal == "gates" else equal_gates(gates)


def _free_shares(gates: Any, scale: float, local_signal: str) -> Any:
    return scale * _convex_shares(gates, local_signal)


@method(
    source=SOURCE,
    grain="row",
    ordered=True,
    model_count=(2, None),
    kernel="graftkit.methods.graft_kernels:graft",
    gates=("local", "weight"),
    lookups=LOOKUPS,
    shares=_graft_shares,
)
def graft(
    models: "Tensor",
    signals: "Tensor",
    gates: "Tensor",
    *,
    a: Share = 0.4,
    c: Slope = 500.0,
    bins: Bins = 10,
    last_bin: Literal["closed", "open"] = "closed",
    normaliser: Literal["pi", "c"] = "pi",
    global_signal: Signal = "entropy",
    local_signal: Gates = "gates",
    sharpness: Sharpness = 1.0,
    of: Of = "weights",
) -> "Tensor":
    """Fuse models channel by channel, by a learnt gate for each channel and an entropy gate for each matrix.

    Formula: `sum_t w_t W_t` with `w = softmax_t(sharpness * u_t)`, `u_t = g_t (1 - exp(-g_t l_t))`,
    `g_t = 1/2 + a/pi arctan(c (H_t - mean of the others' H))`; l_t the stored gates, which sum to one over the models,
    H_t the entropy of the values of W_t. For two models, equations 1 to 8 of the paper: the first is its base.

    Shapes: models [models, out, ...], signals [models], gates [models, out, in or 1] -> [out, ...].

    Knobs:
        a: width of the global gate, which lies within 1/2 +- a/2; 0 switches it off.
        c: slope of the global gate, per unit of the signal; 0 switches it off, and at 500 a difference of 0.02 nats
            all but saturates it.
        bins: bins of the histogram whose entropy is taken; with 1 all entropies are 0.
        last_bin: `closed` counts the largest value (numpy's bins); `open` leaves it out, as the ancestors' code does,
            which changes the entropy of small matrices.
        normaliser: `pi` divides a by pi, `c` by c, as the paper's body prints: the global gate then hardly moves.
        global_signal: H is the `entropy`, the `spectral` norm of the matrix, or `none`: g = 1/2 for two models.
        local_signal: `gates` reads them from the recipe's `gates:` file; `none`: l = 1/2, and no file is needed.
        sharpness: factor on what goes into the softmax; 1 is the paper's, 0 the mean of the models, and large values
            give each channel to one model.
        of: H is that of the models' `weights`, or of their deltas (`product`: for adapters BA), beside which a common
            base weighs nothing; `factors` fuses the adapters' A and B each by itself, B by the gates, A by the entropy
            gate alone, into an adapter of their rank.

    Source: Graft (arXiv 2506.23940), section 3; a/pi as in its algorithm and in its ancestors' code.

    Deviations: the paper's body prints a/c (`normaliser: c`), and in one version leaves out the minus in equation 6,
    which is there here. As published the weights stay within 0.41 and 0.59: no channel goes to one model;
    `sharpness` is ours. For more than two models the paper gives no formula; this one is symmetric and equals its own
    at two. Embeddings, heads, norms and biases, of which it does not speak, are averaged; a rule may give the first
    two gates of their own. Entropies are numpy's (last bin closed) and in nats. For adapters the paper fuses "LoRA
    parameters": `of: factors`, which depends on how each adapter splits its delta (two that do the same may cancel);
    the default fuses what adapters do.

    Use it when: two experts of one base are to be fused and there is data to learn or to solve gates from; without a
    gates file it is an average whose weights lean by entropy.

    Example: without gates; the first matrix has the higher entropy, and gets 0.54 of each channel.
        >>> pair = models.reshape(2, 2, 2)
        >>> get("graft").run(models=pair, local_signal="none")
        tensor([[2.5410, 1.1885],
                [1.1352, 0.5410]])
    """
    return fuse(models, _graft_shares(signals, gates, a, c, normaliser, local_signal, sharpness))


@method(
    source="The closed form beside Graft (arXiv 2506.23940); ours",
    grain="row",
    ordered=True,
    model_count=(2, None),
    kernel="graftkit.methods.graft_kernels:graft_convex",
    gates=("weight", "local"),
    lookups={"local_signal": "none"},
    shares=_convex_shares,
)
def graft_convex(models: "Tensor", gates: "Tensor", *, local_signal: Gates = "gates") -> "Tensor":
    """Fuse models channel by channel, by stored weights that sum to one, as they are.

    Formula: `sum_t w_t W_t`.

    Shapes: models [models, out, ...], gates [models, out, in or 1] -> [out, ...].

    Knobs:
        local_signal: `gates` reads the weights from the recipe's `gates:` file; `none` averages.

    Source: ours; Graft's equation 8 without 4 to 7, which would squash solved weights into 0.41 to 0.59.

    Deviations: none; embeddings, heads, norms and biases are averaged.

    Use it when: gates were solved (`graft gates solve`), and are to be merged as they came out.

    Example: the first row from the first model, the second from both.
        >>> pair, gates = models.reshape(2, 2, 2), torch.tensor([[1.0, 0.5], [0.0, 0.5]])
        >>> get("graft_convex").run(models=pair, gates=gates)
        tensor([[3.0000, 0.5000],
                [1.1250, 0.5000]])
    """
    return fuse(models, _convex_shares(gates, local_signal))


@method(
    source="Free coefficients beside Graft (arXiv 2506.23940); ours",
    grain="row",
    ordered=True,
    kernel="graftkit.methods.graft_kernels:graft_free",
    gates=("coefficient", "weight", "local"),
    lookups={"local_signal": "none"},
    shares=_free_shares,
)
def graft_free(
    deltas: "Tensor",
    gates: "Tensor",
    *,
    scale: Annotated[float, Range(search=(0, 2))] = 1.0,
    local_signal: Gates = "gates",
) -> "Tensor":
    """Add up deltas channel by channel, each by a stored coefficient that nothing binds to the others.

    Formula: `scale * sum_t alpha_t delta_t`.

    Shapes: deltas [models, out, ...], gates [models, out, in or 1] -> merged delta [out, ...].

    Knobs:
        scale: factor on the merged delta; 0 returns the base.
        local_signal: `gates` reads the coefficients from the recipe's `gates:` file; `none`: the mean of the deltas.

    Source: ours; weights that sum to one halve two deltas that do not conflict, free coefficients need not.

    Deviations: none; embeddings, heads, norms and biases get the mean of the deltas.

    Use it when: the models share a base, and gates were solved or trained as free coefficients.

    Example: the first row takes both deltas whole, the second neither.
        >>> pair, gates = models.reshape(2, 2, 2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> get("graft_free").run(base=base.reshape(2, 2), models=pair, gates=gates)
        tensor([[4.0000, 1.5000],
                [1.0000, 1.0000]])
    """
    alpha = (gates if local_signal == "gates" else equal_gates(gates)).to(deltas.dtype)
    flat = deltas.reshape(len(deltas), alpha.shape[1], deltas[0].numel() // max(alpha.shape[1], 1))
    total = alpha[0] * flat[0]
    for t in range(1, len(flat)):
        total = total + alpha[t] * flat[t]
    return (scale * total).reshape(deltas.shape[1:])
