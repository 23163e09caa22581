"""Sparse deltas: parts of each delta, by magnitude or by chance, added up or put to TIES' vote."""

from typing import TYPE_CHECKING, Annotated, Literal

from graftkit.methods import PerModel, Range, method
from graftkit.methods.parts import combined, per_model, within

if TYPE_CHECKING:
    from torch import Tensor

    from graftkit.methods.random import Keyed

Weight = Annotated[PerModel, Range(search=(0, 1))]
Density = Annotated[PerModel, Range(0, 1)]
Scale = Annotated[float, Range(search=(0, 2))]

LEAST = 1e-3  # keep probability below which an entry is not scaled up further: its factor would be noise


@method(
    source="Davari and Belilovsky 2024, Model Breadcrumbs (arXiv 2312.06795)",
    grain="element",
    kernel="graftkit.methods.kernels:breadcrumbs",
)
def breadcrumbs(
    deltas: "Tensor",
    band: "Tensor",
    *,
    weight: Weight = 1.0,
    density: Density = 0.9,
    outliers: Annotated[PerModel, Range(0, 1, search=(0, 0.05))] = 0.01,
    scale: Scale = 1.0,
    elect: Literal["none", "sign"] = "none",
    combine: Literal["mean", "sum"] = "mean",
    weighted_election: bool = False,
) -> "Tensor":
    """Leave out the largest and the smallest entries of each delta, then add up the deltas.

    Formula: `d_t` = delta_t where its magnitude is below the top `outliers` and among the top `outliers + density`,
    else 0; `scale * sum_t weight_t d_t`, or TIES' election of the d_t with `elect: sign`.

    Shapes: deltas [models, *shape], band [2, models] -> merged delta [*shape].

    Knobs:
        weight: weight of each delta.
        density: share of entries kept; 1 keeps all, outliers too, 0 returns the base.
        outliers: share of largest entries left out (the paper's gamma); 0 trims as TIES does.
        scale: factor on the merged delta (the paper's alpha).
        elect: `sign` combines only entries of the elected sign (mergekit's breadcrumbs_ties), `none` adds all.
        combine: with an election, mean over the agreeing models or sum (mergekit's default).
        weighted_election: weights count in the election already (mergekit), instead of after it.

    Source: Davari and Belilovsky 2024 (arXiv 2312.06795).

    Deviations: shares are counted within the tensor, as in mergekit (the authors' code: within each row), and what
    ties with the last entry kept, at either end, is kept.
    """
    return scale * combined(within(deltas, band), weight, elect, combine, weighted_election)


@method(source="Deep et al. 2024, DELLA-Merging (arXiv 2406.11617)", grain="row")
def della(
    deltas: "Tensor",
    rng: "Keyed",
    *,
    weight: Weight = 1.0,
    density: Density = 0.5,
    epsilon: Annotated[PerModel, Range(0, 0.5, search=(0, 0.2))] = 0.15,
    scale: Scale = 1.0,
    elect: Literal["none", "sign"] = "sign",
    combine: Literal["mean", "sum"] = "mean",
    weighted_election: bool = False,
    rescale: bool = True,
) -> "Tensor":
    """Drop entries at random, small ones more often, divide the rest by their chance, then let TIES' vote combine them.

    Formula: `d_t = b_t delta_t / q_t`, b_t 1 with probability q_t; the entry of rank r among the n of its row, by
    magnitude and from 0 at the smallest, has `q = density - epsilon + 2 epsilon r / (n - 1)`. Then
    `scale * TIES'` election and mean of the d_t, or `scale * sum_t weight_t d_t` with `elect: none`.

    Shapes: deltas [models, *shape] -> merged delta [*shape]; rows run along the last axis.

    Knobs:
        weight: weight of each delta.
        density: mean probability to keep an entry (1 minus the paper's drop rate); 1 keeps all, 0 returns the base.
        epsilon: half the window of probabilities; 0 is DARE. Narrowed where it would leave the range 0 to 1.
        scale: factor on the merged delta (the paper's lambda).
        elect: `sign` combines only entries of the elected sign, `none` adds all (mergekit's della_linear).
        combine: with an election, mean over the agreeing models or sum.
        weighted_election: weights count in the election already (mergekit), instead of after it.
        rescale: divide by the probability, so that the expected delta is the full one.

    Source: Deep et al. 2024 (arXiv 2406.11617), MagPrune.

    Deviations: a row of one entry is kept with probability `density` (mergekit 0.1.5 fails on it), entries kept against
    odds of more than 1000 to 1 are scaled by 1000 at most, and each is divided by its own probability (mergekit:
    one ratio of L1 norms for the tensor).
    """
    import torch

    chance = keep_probability(deltas, density, epsilon)
    kept = torch.where(rng.uniform(deltas) < chance, deltas, torch.zeros_like(deltas))
    scaled = kept / chance.clamp(min=LEAST).to(deltas.dtype) if rescale else kept
    return scale * combined(scaled, weight, elect, combine, weighted_election)


def keep_probability(deltas: "Tensor", density: PerModel, epsilon: PerModel) -> "Tensor":
    """DELLA's q, float64 [models, *shape]: rises with the rank of the magnitude in its row; ties rank by position."""
    import torch

    rows = deltas.detach().abs() if deltas.ndim > 1 else deltas.detach().abs()[:, None]
    count = rows.shape[-1]
    order = rows.argsort(dim=-1, stable=True)  # [models, ..., row]
    steps = torch.arange(count, dtype=torch.float64, device=rows.device).expand(order.shape)
    rank = torch.empty_like(order, dtype=torch.float64).scatter_(-1, order, steps)
    place = 2 * rank / (count - 1) - 1 if count > 1 else torch.zeros_like(rank)
    middle = per_model(density, place)
    window = torch.minimum(per_model(epsilon, place), torch.minimum(middle, 1 - middle))
    return (middle + window * place).reshape(deltas.shape)
