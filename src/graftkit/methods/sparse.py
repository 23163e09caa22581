"""Sparse deltas: parts of each delta, by magnitude or by chance, added up or put to TIES' vote."""

from typing import TYPE_CHECKING, Annotated, Literal

from graftkit.methods import PerModel, Range, method
from graftkit.methods.parts import combined, restored, within
from graftkit.methods.preparations import magprune

if TYPE_CHECKING:
    from torch import Tensor

    from graftkit.methods.random import Keyed

Weight = Annotated[PerModel, Range(search=(0, 1))]
Density = Annotated[PerModel, Range(0, 1)]
Scale = Annotated[float, Range(search=(0, 2))]


@method(
    source="Davari and Belilovsky 2024, Model Breadcrumbs (arXiv 2312.06795)",
    grain="element",
    kernel="graftkit.methods.kernels:breadcrumbs",
    sparsifier="breadcrumbs",
)
def breadcrumbs(
    deltas: "Tensor",
    band: "Tensor",
    retained: "Tensor",
    *,
    weight: Weight = 1.0,
    density: Density = 0.9,
    outliers: Annotated[PerModel, Range(0, 1, search=(0, 0.05))] = 0.01,
    scale: Scale = 1.0,
    elect: Literal["none", "sign"] = "none",
    normalize: bool = False,
    combine: Literal["mean", "sum"] = "mean",
    weighted_election: bool = False,
    rescale: bool = False,
) -> "Tensor":
    """Leave out the largest and the smallest entries of each delta, then add up the deltas.

    Formula: `d_t` = delta_t where its magnitude is below the top `outliers` and among the top `outliers + density`,
    else 0; `scale * sum_t weight_t d_t`, or TIES' election of the d_t with `elect: sign`.

    Shapes: deltas [models, *shape], band [2, models], retained [models] -> merged delta [*shape].

    Knobs:
        weight: weight of each delta.
        density: share of entries kept; 1 keeps all, outliers too, 0 returns the base.
        outliers: share of largest entries left out (the paper's gamma); 0 trims as TIES does.
        scale: factor on the merged delta (the paper's alpha).
        elect: `sign` combines only entries of the elected sign (mergekit's breadcrumbs_ties), `none` adds all.
        normalize: without an election, divide by the sum of the weights.
        combine: with an election, mean over the agreeing models or sum (mergekit's default).
        weighted_election: weights count in the election already (mergekit), instead of after it.
        rescale: scale what is left of each delta to the L1 norm that it had in this tensor.

    Source: Davari and Belilovsky 2024 (arXiv 2312.06795).

    Deviations: shares are counted within the tensor, as in mergekit (the authors' code: within each row), and what
    ties with the last entry kept, at either end, is kept; the realised density is in the record.

    Use it when: a few very large entries of each delta would decide a sum of many models, and the smallest are
    taken for noise.

    Example: of the first delta the largest entry (2) and the smallest (0) are left out; in the second all that tie
    with the largest stay.
        >>> get("breadcrumbs").run(base=base, models=models, density=0.5, outliers=0.25)
        tensor([2.0000, 1.5000, 1.2500, 0.0000])
    """
    kept = restored(within(deltas, band), retained)
    return scale * combined(
        kept, weight, elect=elect, normalize=normalize, combine=combine, weighted_election=weighted_election
    )


@method(source="Deep et al. 2024, DELLA-Merging (arXiv 2406.11617)", grain="row", sparsifier="magprune")
def della(
    deltas: "Tensor",
    rng: "Keyed",
    retained: "Tensor",
    *,
    weight: Weight = 1.0,
    density: Density = 0.5,
    epsilon: Annotated[PerModel, Range(0, 0.5, search=(0, 0.2))] = 0.15,
    scale: Scale = 1.0,
    elect: Literal["none", "sign"] = "sign",
    normalize: bool = False,
    combine: Literal["mean", "sum"] = "mean",
    weighted_election: bool = False,
    rescale: bool = True,
    rescale_by: Literal["chance", "l1"] = "chance",
) -> "Tensor":
    """Drop entries at random, small ones more often, divide the rest by their chance, then let TIES' vote combine them.

    Formula: `d_t = b_t delta_t / q_t`, b_t 1 with probability q_t; the entry of rank r among the n of its row, by
    magnitude and from 0 at the smallest, has `q = density - epsilon + 2 epsilon r / (n - 1)`. Then
    `scale * TIES'` election and mean of the d_t, or `scale * sum_t weight_t d_t` with `elect: none`.

    Shapes: deltas [models, *shape], retained [models] -> merged delta [*shape]; rows run along the last axis.

    Knobs:
        weight: weight of each delta.
        density: mean probability to keep an entry (1 minus the paper's drop rate); 1 keeps all, 0 returns the base.
        epsilon: half the window of probabilities; 0 is DARE. Narrowed where it would leave the range 0 to 1.
        scale: factor on the merged delta (the paper's lambda).
        elect: `sign` combines only entries of the elected sign, `none` adds all (mergekit's della_linear).
        normalize: without an election, divide by the sum of the weights.
        combine: with an election, mean over the agreeing models or sum.
        weighted_election: weights count in the election already (mergekit), instead of after it.
        rescale: divide by the probability, so that the expected delta is the full one.
        rescale_by: `chance` is each entry's own probability; `l1` scales each delta to the L1 norm that it had in this
            tensor, by one factor (mergekit).

    Source: Deep et al. 2024 (arXiv 2406.11617), MagPrune.

    Deviations: a row of one entry is kept with probability `density` (mergekit 0.1.5 fails on it), entries kept against
    odds of more than 1000 to 1 are scaled by 1000 at most, and each is divided by its own probability by default
    (mergekit: one ratio of L1 norms for the tensor).

    Use it when: DARE is what is wanted, but large entries should stay more often than small ones.

    Example: kept are 2, -0.5 and 0.25 of the first delta, by chances of 0.8, 0.67 and 0.53, and the first 1 of the
    second, by 0.53; each is divided by its chance.
        >>> from graftkit.methods.random import Keyed
        >>> rng, knobs = Keyed.of(seed=3, models=2), {"density": 0.6, "epsilon": 0.2, "elect": "none"}
        >>> get("della").run(base=base, models=models, rng=rng, **knobs)
        tensor([5.3750, 0.2500, 1.4688, 1.0000])
    """
    own = rescale and rescale_by == "chance"
    kept = restored(magprune(deltas, rng, density=density, epsilon=epsilon, rescale=own), retained)
    return scale * combined(
        kept, weight, elect=elect, normalize=normalize, combine=combine, weighted_election=weighted_election
    )
