"""Arithmetic on task deltas: add, trim, drop, elect."""

from typing import TYPE_CHECKING, Annotated, Literal

from graftkit.methods import PerModel, Range, method
from graftkit.methods.ballots import Ballot
from graftkit.methods.parts import combined, disjoint, drop, per_model, restored, spread, trim, weighted_sum

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from graftkit.methods.random import Keyed

Weight = Annotated[PerModel, Range(search=(0, 1))]
Density = Annotated[PerModel, Range(0, 1)]
Scale = Annotated[float, Range(search=(0, 2))]


def _sum_factors(count: int, weight: PerModel, scale: float, normalize: bool) -> "np.ndarray":
    weights = scale * spread(weight, count)
    return weights / spread(weight, count).sum() if normalize else weights  # type: ignore[no-any-return]


def _ties_ballot(
    count: int,
    threshold: "np.ndarray",
    retained: "np.ndarray",
    weight: PerModel,
    scale: float,
    combine: str,
    weighted_election: bool,
) -> Ballot:
    weights = spread(weight, count)
    votes = weights if weighted_election else spread(1, count)
    return Ballot(threshold, spread(1, count), 1 / retained, votes, weights, combine == "mean", scale)


def _dare_ballot(
    count: int,
    retained: "np.ndarray",
    weight: PerModel,
    density: PerModel,
    scale: float,
    elect: str,
    normalize: bool,
    combine: str,
    weighted_election: bool,
    rescale: bool,
    rescale_by: str,
) -> Ballot:
    weights, shares, all_ = spread(weight, count), spread(density, count), spread(0, count)
    divided = shares if rescale and rescale_by == "chance" else spread(1, count)
    gains = 1 / (retained * divided + (divided == 0))  # a share of nothing keeps nothing to scale
    if elect == "none":
        return Ballot(all_, shares, gains, None, weights / (weights.sum() if normalize else 1), False, scale)
    votes = weights if weighted_election else spread(1, count)
    return Ballot(all_, shares, gains, votes, weights, combine == "mean", scale)


@method(
    source="Ilharco et al. 2023, Editing models with task arithmetic (arXiv 2212.04089)",
    grain="element",
    rotations="both",
    factors=_sum_factors,
)
def task_arithmetic(deltas: "Tensor", *, weight: Weight = 1.0, scale: Scale = 1.0, normalize: bool = False) -> "Tensor":
    """Weighted sum of task deltas.

    Formula: `scale * sum_t weight_t delta_t`, divided by `sum_t weight_t` with `normalize`.

    Shapes: deltas [models, *shape] -> merged delta [*shape].

    Knobs:
        weight: factor of each delta; 1 adds it whole, 0 leaves it out, negative values subtract a skill.
        scale: factor on the sum (the papers' lambda); 0 returns the base.
        normalize: divide by the sum of the weights; equal weights then give the average of the models.

    Source: Ilharco et al. 2023 (arXiv 2212.04089), section 2.

    Deviations: none; computed a precision above the output and rounded once, where mergekit 0.1.5 computes in bfloat16.

    Use it when: there is a base, and skills are to be added, weakened or (by negative weights) taken away: the
    first thing to try, and what the other methods are to be compared with. Deltas add up: with many models, lower
    `scale`.

    Example: the first delta whole, and half of the second taken away.
        >>> get("task_arithmetic").run(base=base, models=models, weight=[1, -0.5])
        tensor([2.5000, 0.0000, 1.2500, 1.5000])
    """
    total = weighted_sum(deltas, weight)
    return scale * (total / per_model(weight, deltas).sum() if normalize else total)


@method(
    source="Yadav et al. 2023, TIES-Merging (arXiv 2306.01708)",
    grain="element",
    kernel="graftkit.methods.kernels:ties",
    ballot=_ties_ballot,
    sparsifier="trim",
)
def ties(
    deltas: "Tensor",
    threshold: "Tensor",
    retained: "Tensor",
    *,
    weight: Weight = 1.0,
    density: Density = 0.2,
    scale: Scale = 1.0,
    scope: Literal["tensor", "model"] = "tensor",
    combine: Literal["mean", "sum"] = "mean",
    weighted_election: bool = False,
    rescale: bool = False,
) -> "Tensor":
    """Trim each delta to its largest entries, elect a sign per entry, combine what agrees with it.

    Formula: `d_t` = delta_t where its magnitude is among the top `density`, else 0; `s = sign(sum_t d_t)`;
    `scale * sum_{t: sign(d_t) = s} weight_t d_t / sum_{same t} weight_t` (no division for `combine: sum`).

    Shapes: deltas [models, *shape], threshold [models], retained [models] -> merged delta [*shape].

    Knobs:
        weight: weight of each delta in the combination.
        density: share of entries kept, 1 keeps all (no trimming), 0 none (returns the base).
        scale: factor on the merged delta (the paper's lambda).
        scope: count the share within each tensor, or over all tensors of the model that the same settings merge.
        combine: mean over the agreeing models (the paper), or sum.
        weighted_election: weights count in the election already (mergekit), instead of after it.
        rescale: scale each trimmed delta to the L1 norm that it had in this tensor.

    Source: Yadav et al. 2023 (arXiv 2306.01708), section 4; keeps the top 20 %.

    Deviations: every entry that ties with the k-th is kept (bfloat16 deltas tie often; the realised density is in the
    record), an exactly zero sum elects plus (the authors' code: the majority of all signs), the count is rounded down
    (theirs: one more), and the default scope is the tensor (theirs: the model).

    Use it when: models change the same entries in opposite directions, so that a plain sum cancels what they
    learnt.

    Example: of the first delta its two largest entries are kept, of the second the three that tie. In the second
    entry 1 outvotes -0.5 and goes in alone; in the first both agree, and their mean goes in.
        >>> get("ties").run(base=base, models=models, density=0.5)
        tensor([2.5000, 2.0000, 1.0000, 0.0000])
    """
    kept = restored(trim(deltas, threshold), retained)
    return scale * disjoint(kept, weight, weighted_election=weighted_election, mean=combine == "mean")


@method(
    source="Yu et al. 2024, Language models are Super Mario (arXiv 2311.03099)",
    grain="element",
    kernel="graftkit.methods.kernels:dare",
    ballot=_dare_ballot,
    sparsifier="dare",
)
def dare(
    deltas: "Tensor",
    rng: "Keyed",
    retained: "Tensor",
    *,
    weight: Weight = 1.0,
    density: Density = 0.5,
    scale: Scale = 1.0,
    elect: Literal["none", "sign"] = "none",
    normalize: bool = False,
    combine: Literal["mean", "sum"] = "mean",
    weighted_election: bool = False,
    rescale: bool = True,
    rescale_by: Literal["chance", "l1"] = "chance",
) -> "Tensor":
    """Drop entries of each delta at random, divide the rest by the share kept, then add them up.

    Formula: `d_t = mask_t * delta_t / density_t`, mask entries independent and 1 with probability `density_t`;
    `scale * sum_t weight_t d_t`, or TIES' election and disjoint mean of the `d_t` with `elect: sign`.

    Shapes: deltas [models, *shape], retained [models] -> merged delta [*shape].

    Knobs:
        weight: weight of each delta.
        density: probability to keep an entry (1 minus the paper's drop rate); 1 keeps all, 0 returns the base.
        scale: factor on the merged delta.
        elect: `sign` combines only entries of the elected sign (the peers' dare_ties), `none` adds all (dare_linear).
        normalize: without an election, divide by the sum of the weights.
        combine: with an election, mean over the agreeing models or sum (mergekit's default).
        weighted_election: weights count in the election already (mergekit), instead of after it.
        rescale: divide by the density, so that the expected delta is the full one.
        rescale_by: `chance` is the density; `l1` scales each delta to the L1 norm that it had in this tensor, by one
            factor (mergekit), which depends on what was drawn where the tensor is small.

    Source: Yu et al. 2024 (arXiv 2311.03099), section 3.

    Deviations: none; by default each entry is divided by the density itself (mergekit 0.1.5 rescales a tensor by one
    ratio of L1 norms), and masks are keyed by content, not drawn from a global generator.

    Use it when: deltas are small and redundant, as after supervised fine-tuning (the paper: magnitudes below about
    0.002), and are to meet in fewer entries. The result depends on the seed, and its noise grows as the density
    falls.

    Example: this seed keeps 2 and 0.25 of the first delta, and the first 1 of the second; each is doubled.
        >>> from graftkit.methods.random import Keyed
        >>> rng = Keyed.of(seed=3, models=2)
        >>> get("dare").run(base=base, models=models, rng=rng, density=0.5)
        tensor([7.0000, 1.0000, 1.5000, 1.0000])
    """
    kept = restored(drop(deltas, rng.uniform(deltas), density, rescale and rescale_by == "chance"), retained)
    return scale * combined(
        kept, weight, elect=elect, normalize=normalize, combine=combine, weighted_election=weighted_election
    )
