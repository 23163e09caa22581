"""WUDI: the merged delta that interferes least with each model on the inputs that its own delta speaks of.

The objective `sum_t |(M - delta_t) delta_t^T|^2 / |delta_t|^2` is a convex quadratic in M, so descent on it is solved
direction by direction in the eigenbasis of `C = sum_t delta_t^T delta_t / |delta_t|^2`, instead of by iterations.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from graftkit.methods import PerModel, Range, method
from graftkit.methods.decomposition import eigen, spectrum
from graftkit.methods.spectral import Inputs, by_matrix

if TYPE_CHECKING:
    from torch import Tensor

Weight = Annotated[PerModel, Range(search=(0, 2))]
Scale = Annotated[float, Range(search=(0, 2))]
Steps = Annotated[int, Range(0, search=(1, 1000))]
Rate = Annotated[float, Range(0)]
BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Adam's, as published."""

TOLERANCE = 1e-10
"""Of opt_merge: directions of a smaller share of the largest eigenvalue stay as they were."""


@method(
    source="Cheng et al. 2025, Whoever started the interference should end it (arXiv 2503.08099), WUDI-Merging",
    grain="tensor",
    rotations="both",
    entrywise={"solver": "adam"},
    matrices=True,
)
def wudi(
    deltas: "Tensor",
    *,
    weight: Weight = 1.0,
    scale: Scale = 1.0,
    solver: Literal["early_stopped", "exact", "adam"] = "early_stopped",
    steps: Steps = 3,
    start: Literal["sum", "mean", "zero"] = "sum",
    ridge: Annotated[float, Range(0, search=(0, 0.1))] = 0.0,
    tolerance: Annotated[float, Range(1e-14, 1)] = 1e-10,
    learning_rate: Rate = 1e-5,
    inputs: Inputs = "family",
) -> "Tensor":
    """Move the sum of the deltas to where it disturbs each model least on the inputs that its own delta reads.

    Formula: `d_t = weight_t delta_t`, `C = sum_t d_t^T d_t / |d_t|^2 = V diag(l) V^T`, `D = sum_t d_t d_t^T d_t /
    |d_t|^2`, M0 the `start`; `scale * (M0 + (D V / l - M0 V) diag(f) V^T)` with
    `f = (1 - exp(-steps * (l + ridge))) * l / (l + ridge)`, without the first factor for `solver: exact`.

    Shapes: deltas [models, out, in] -> merged delta [out, in]; of another shape: the mean of the deltas.

    Knobs:
        weight: factor of each delta; 0 leaves the model out.
        scale: factor on the merged delta; 0 returns the base.
        solver: `early_stopped` follows the gradient for a while; `exact` goes to the minimum, for study: on three
            real adapters it wrecked the model although its objective was zero; `adam` is the published optimiser.
        steps: how long the descent lasts, in units of time (SWUDI: 300) or steps of Adam's (published: 300); 0 returns
            the start.
        start: where it begins, and what a direction keeps that nothing decides: the sum (published), the mean, or
            `zero`, which with `solver: exact` is the solution of least norm.
        ridge: pull back towards the start, in units of C, whose eigenvalues sum to the number of models; 0 is none.
            Adam has none.
        tolerance: directions with less than this share of the largest eigenvalue keep the start.
        learning_rate: of Adam; `early_stopped` and `exact` do not look at it.
        inputs: where a matrix keeps its inputs: `columns` (torch's Linear), `rows`, or as the model's family does.

    Source: Cheng et al. 2025 (arXiv 2503.08099), section 4; the early-stopped form as in SWUDI, without its cut of
    directions and shorter.

    Deviations: by default not the published optimiser, whose 300 steps of 1e-5 move no entry by more than 3e-3 and
    so depend on the scale of the deltas: the closed form does not. A delta of zeros is left out. Matrices kept as
    [in, out] are turned. With `solver: adam` the authors' numbers come out, and adapters are merged by their products.

    Use it when: there are no data, and models tuned for different things are to keep what each says on its own
    inputs. Choose `steps` by measurement, the objective alone is no guide. Of two of the orchard's adapters (math with
    code, math with languages; 6 dev items a skill) the sum kept 0.81 and 0.88 of their gains, 3 steps 0.89 and 0.85,
    10 steps 0.86 and 0.73, 30 steps 0.79 and 0.53; 300 of Adam's 0.69 and 0.52. The default is the best of these; on
    5 test items a skill it kept 0.92 and 0.94, the sum 0.90 and 0.90. The exact minimum lies 2.0 to 7.5 times the
    sum's norm away from it.

    Example: input 1 is the first model's and input 3 the second's: both are kept whole. Input 2 is both's: each
    counts by its share of the squares of its delta there, 4/5 and 1/10.
        >>> experts = torch.tensor([[[1.0, 0, 0], [0, 2, 0]], [[0, 0, 3], [0, 1, 0]]])
        >>> get("wudi").run(base=torch.zeros(2, 3), models=experts, solver="exact")
        tensor([[1.0000, 0.0000, 3.0000],
                [0.0000, 1.8889, 0.0000]])
    """

    def merge(live: "list[Tensor]") -> "Tensor":
        first = _start(live, start)
        if solver == "adam":
            return _adam(live, first, steps, learning_rate)
        basis = quadratic(live, live, tolerance)
        gain = basis.values / (basis.values + ridge)
        if solver == "early_stopped":
            gain = gain * -(-steps * (basis.values + ridge)).expm1()
        return basis.moved(first, gain)

    return by_matrix(deltas, weight, scale, merge, transposed=inputs == "rows")


@method(
    source="OptMerge, 2026 (MLLMerging's WUDI v2)",
    grain="tensor",
    rotations="both",
    entrywise={"solver": "adam"},
    matrices=True,
)
def opt_merge(
    deltas: "Tensor",
    shape: tuple[int, ...],
    *,
    weight: Weight = 1.0,
    scale: Scale = 1.0,
    steps: Steps = 300,
    learning_rate: Rate = 1e-4,
    momentum: Annotated[float, Range(0, 0.999)] = 0.9,
    inputs: Inputs = "family",
) -> "Tensor":
    """WUDI from the mean of the deltas, each seen through its first singular directions, by descent with momentum.

    Formula: `d_t = weight_t delta_t`, `e_t` its first `min(out, in) / T` singular directions; `C` and `D` as for
    `wudi`, of `e_t` over `|d_t|^2`; `scale * (M0 + (D V / l - M0 V) diag(1 - r) V^T)` from the mean M0, where `r` is
    what descent with momentum leaves of an error along an eigenvalue l: `v <- momentum v + 2 l r`,
    `r <- r - learning_rate v`, `steps` times from r = 1, v = 0.

    Shapes: deltas [models, out, in] -> merged delta [out, in]; of another shape: the mean of the deltas.

    Knobs:
        weight: factor of each delta; 0 leaves the model out.
        scale: factor on the merged delta; 0 returns the base.
        steps: of the descent; 0 returns the mean.
        learning_rate: of the descent; too large a one diverges, as it does when iterated.
        momentum: share of the last step that goes on; 0 is plain descent.
        inputs: where a matrix keeps its inputs: `columns` (torch's Linear), `rows`, or as the model's family does.

    Source: the WUDI v2 of OptMerge (MLLMerging): rank, denominators, start and optimiser as in its code.

    Deviations: the iterations are solved in the eigenbasis, which gives their numbers without their rounding; a
    delta of zeros is left out and not counted, and at least one direction is kept. Matrices kept as [in, out] are
    turned.

    Use it when: `wudi` is too strong a change: from the mean, with its published step, this one hardly leaves it.

    Example: with few small steps the mean of the deltas.
        >>> experts = torch.tensor([[[1.0, 0, 0], [0, 2, 0]], [[0, 0, 3], [0, 1, 0]]])
        >>> get("opt_merge").run(base=torch.zeros(2, 3), models=experts, steps=0)
        tensor([[0.5000, 0.0000, 1.5000],
                [0.0000, 1.5000, 0.0000]])
    """

    def merge(live: "list[Tensor]") -> "Tensor":
        most = max(1, min(shape) // len(live))
        seen = [(found.left * found.sizes) @ found.right for found in (spectrum(delta, most) for delta in live)]
        basis = quadratic(live, seen, TOLERANCE)
        return basis.moved(_start(live, "mean"), 1 - _left_over(basis.values, steps, learning_rate, momentum))

    return by_matrix(deltas, weight, scale, merge, transposed=inputs == "rows")


class Quadratic(NamedTuple):
    """WUDI's objective along the eigenvectors of C: eigenvalues [k], `directions` [in, k], minima there [out, k]."""

    values: "Tensor"
    directions: "Tensor"
    minima: "Tensor"

    def moved(self, start: "Tensor", gain: "Tensor") -> "Tensor":
        """The start, moved by a share `gain` [k] of the way to the minimum along each direction."""
        return start + ((self.minima - start @ self.directions) * gain) @ self.directions.T


def quadratic(deltas: "Sequence[Tensor]", seen: "Sequence[Tensor]", tolerance: float) -> Quadratic:
    """The objective of what is `seen` of the deltas, over the deltas' squared norms."""
    import torch

    units = [part / delta.norm() for delta, part in zip(deltas, seen, strict=True)]
    values, directions = eigen(torch.cat(units), tolerance)
    pull = torch.zeros_like(deltas[0])
    for unit, part in zip(units, seen, strict=True):
        wide = unit.shape[0] < unit.shape[1]
        pull = pull + ((unit @ unit.T) @ part if wide else part @ (unit.T @ unit))
    return Quadratic(values, directions, (pull @ directions) / values)


def _start(live: "list[Tensor]", start: str) -> "Tensor":
    """The sum or the mean of the deltas, or zero."""
    total = live[0]
    for delta in live[1:]:
        total = total + delta
    return total * {"sum": 1.0, "mean": 1 / len(live), "zero": 0.0}[start]


def _left_over(values: "Tensor", steps: int, rate: float, momentum: float) -> "Tensor":
    """The share of an error along each eigenvalue that is left after some steps of descent with momentum."""
    import torch

    left, speed = torch.ones_like(values), torch.zeros_like(values)
    for _ in range(steps):
        speed = momentum * speed + 2 * values * left
        left = left - rate * speed
    return left


def _adam(live: "list[Tensor]", start: "Tensor", steps: int, rate: float) -> "Tensor":
    """Adam on the objective, its gradient `2 (M C - D)` by C and D."""
    import torch

    grams = [delta.T @ delta / delta.square().sum() for delta in live]
    total, pull = sum(grams[1:], grams[0]), sum((d @ g for d, g in zip(live, grams, strict=True)), 0 * start)
    made, mean, square = start, torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, steps + 1):
        slope = 2 * (made @ total - pull)
        mean = BETAS[0] * mean + (1 - BETAS[0]) * slope
        square = BETAS[1] * square + (1 - BETAS[1]) * slope.square()
        spread = (square / (1 - BETAS[1] ** step)).sqrt() + EPSILON
        made = made - rate * (mean / (1 - BETAS[0] ** step)) / spread
    return made
