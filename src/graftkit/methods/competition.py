"""Competition: the deltas themselves say how much each model counts, and where."""

from typing import TYPE_CHECKING, Annotated, Any

from graftkit.methods import PerModel, Range, method
from graftkit.methods.parts import disjoint, kept_count, selected, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

Scale = Annotated[float, Range(search=(0, 2))]

CLIPPED = 0.01  # share of a delta's magnitudes that PCB pulls in, at either end


@method(
    source="Wan et al. 2024, FuseChat: Knowledge fusion of chat models (arXiv 2408.07990)",
    grain="element",
    kernel="graftkit.methods.kernels:sce",
)
def sce(
    deltas: "Tensor",
    variation: "Tensor",
    energies: "Tensor",
    *,
    select_topk: Annotated[float, Range(0, 1)] = 1.0,
    scale: Scale = 1.0,
    floor: Annotated[float, Range(0, search=(0, 1e-6))] = 0.0,
) -> "Tensor":
    """Select the positions at which models differ most, calculate weights from the energies there, erase minorities.

    Formula: `d_t` = delta_t at the `select_topk` positions of largest variance over models, else 0;
    `w_t = |d_t|^2 / sum_s |d_s|^2`; `scale * sum_{t: sign(d_t) = s} w_t d_t / sum_{same t} w_t`, s = sign(sum_t d_t).

    Shapes: deltas [models, *shape], variation [1], energies [models] -> merged delta [*shape].

    Knobs:
        select_topk: share of the positions with any variance that is kept; 1 keeps all positions, 0 returns the base.
            Models that are all alike have no variance: below 1 they give the base.
        scale: factor on the merged delta.
        floor: the models count alike where the sum of their deltas' mean squares is below it (mergekit: 1e-6).

    Source: Wan et al. 2024 (arXiv 2408.07990), SCE merging.

    Deviations: positions that tie with the last one selected are kept, and at least one is; by default deltas are never
    too small for weights (mergekit 0.1.5 takes equal ones below a mean square of 1e-6, where most fine-tuning lies).

    Use it when: the models' weights should follow from their deltas, tensor by tensor, and not from a search.

    Example: the weights are 0.59 and 0.41, from the sums of squares 4.31 and 3 of the deltas; in the second entry 1
    outvotes -0.5.
        >>> get("sce").run(base=base, models=models)
        tensor([2.5897, 2.0000, 1.2500, 0.0000])
    """
    weights = sce_weights(energies, floor).tolist()
    return scale * disjoint(selected(deltas, variation), weights, weighted_election=False, mean=True)


def sce_weights(energies: Any, floor: float) -> Any:
    """Energies as shares of their sum, equal where that is zero or below the floor; of a tensor or a numpy array."""
    total = energies.sum()
    return energies / total if total > 0 and total >= floor else 0 * energies + 1 / len(energies)


@method(source="Du et al. 2024, Parameter competition balancing for model merging (arXiv 2410.02396)", grain="tensor")
def pcb(
    deltas: "Tensor",
    *,
    weight: Annotated[PerModel, Range(search=(0.8, 1.3))] = 1.2,
    density: Annotated[float, Range(0, 1, search=(0.05, 0.2))] = 0.05,
) -> "Tensor":
    """Entries compete by their size in their own model and by what the other models want there; few winners go in.

    Formula: with `a_t` the magnitude of delta_t pulled in to its 1 % quantiles at both ends and `n_t` the same on a
    scale from 0 to 1, signed: `score_t = exp(T n_t^2) sum_s tanh(n_t n_s)`; `s_t` is score_t on a scale from 0 at the
    smallest of the top `density` to 1, and 0 below; `sum_t s_t weight_t sign(delta_t) a_t / sum_t s_t`.

    Shapes: deltas [models, *shape] -> merged delta [*shape].

    Knobs:
        weight: factor of each delta (the paper's lambda), 1.2 in the authors' code, or searched from 0.8 to 1.3.
        density: share of the entries of each model that win; 0 returns the base, 1 lets all compete.

    Source: Du et al. 2024 (arXiv 2410.02396), in the form of the authors' `pcb_ES.py`. Their other script has
    `tanh(delta_t sum_s delta_s)` of deltas as they are, which for fine-tuning is the tanh of nearly nothing.

    Deviations: quantiles and scores are those of the tensor (the authors': of the whole model, in memory). Where all
    magnitudes, or all winning scores, are equal, they count as 1 (the authors' code divides by zero).

    Use it when: no data is at hand to choose weights by, and models disagree about the same entries.

    Example: both models win the first entry, on which they agree. On four entries the quantiles pull 2 in to 0.5,
    so that it becomes 1.2 times the mean of 0.5 and 1.
        >>> get("pcb").run(base=base, models=models, density=0.5)
        tensor([1.9000, 1.0000, 1.0000, 1.0000])
    """
    import torch

    flat = deltas.reshape(deltas.shape[0], -1)
    with torch.no_grad():
        bounds = [_clip_bounds(row) for row in flat.abs()]
        normal = torch.stack([_normalised(row, *ends) for row, ends in zip(flat, bounds, strict=True)])
        share = torch.stack([_winners(score, density) for score in _scores(normal)])
    clipped = torch.stack([row.sign() * row.abs().clamp(*ends) for row, ends in zip(flat, bounds, strict=True)])
    total = weighted_sum(share * clipped, weight)
    divisor = weighted_sum(share, 1.0)
    return (total / torch.where(divisor > 0, divisor, torch.ones_like(divisor))).reshape(deltas.shape[1:])


def _clip_bounds(magnitudes: "Tensor") -> tuple[float, float]:
    """The magnitudes below and above which lies a share of CLIPPED."""
    count = magnitudes.numel()
    if not count:
        return 0.0, 0.0
    low = int(count * CLIPPED)
    high = max(int(count * (1 - CLIPPED)) - 1, low)
    return tuple(float(magnitudes.kthvalue(k + 1).values) for k in (low, high))  # type: ignore[return-value]


def _normalised(delta: "Tensor", low: float, high: float) -> "Tensor":
    """Magnitudes between the bounds on a scale from 0 to 1, with their signs; 1 where the bounds are equal."""
    magnitude = delta.abs().clamp(low, high)
    return delta.sign() * ((magnitude - low) / (high - low) if high > low else magnitude / (high or 1.0))


def _scores(normal: "Tensor") -> "Tensor":
    """Competition within a model times competition with the others, [models, n]."""
    import torch

    within = torch.exp(len(normal) * normal.square())
    between = [weighted_sum(torch.tanh(row * normal), 1.0) for row in normal]
    return within * torch.stack(between)


def _winners(score: "Tensor", density: float) -> "Tensor":
    """The top share of scores on a scale from 0 to 1, all others 0."""
    import torch

    wanted = kept_count(density, score.numel())
    if not wanted:
        return torch.zeros_like(score)
    low, high = (score.kthvalue(score.numel() - k + 1).values for k in (wanted, 1))
    scaled = (score - low) / (high - low) if high > low else (score > 0).to(score.dtype)
    return torch.where(score >= low, scaled, torch.zeros_like(score))
