"""Arithmetic on task deltas: add, trim, drop, elect."""

from typing import TYPE_CHECKING, Annotated, Literal

from graftkit.methods import PerModel, Range, method
from graftkit.methods.parts import disjoint, drop, per_model, trim, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

    from graftkit.methods.random import Keyed

Weight = Annotated[PerModel, Range(search=(0, 1))]
Density = Annotated[PerModel, Range(0, 1)]
Scale = Annotated[float, Range(search=(0, 2))]


@method(
    source="Ilharco et al. 2023, Editing models with task arithmetic (arXiv 2212.04089)",
    grain="element",
    rotations="both",
    kernel="graftkit.methods.kernels:task_arithmetic",
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
    """
    total = weighted_sum(deltas, weight)
    return scale * (total / per_model(weight, deltas).sum() if normalize else total)


@method(
    source="Yadav et al. 2023, TIES-Merging (arXiv 2306.01708)",
    grain="element",
    kernel="graftkit.methods.kernels:ties",
)
def ties(
    deltas: "Tensor",
    threshold: "Tensor",
    *,
    weight: Weight = 1.0,
    density: Density = 0.2,
    scale: Scale = 1.0,
    scope: Literal["tensor", "model"] = "tensor",
    combine: Literal["mean", "sum"] = "mean",
    weighted_election: bool = False,
) -> "Tensor":
    """Trim each delta to its largest entries, elect a sign per entry, combine what agrees with it.

    Formula: `d_t` = delta_t where its magnitude is among the top `density`, else 0; `s = sign(sum_t d_t)`;
    `scale * sum_{t: sign(d_t) = s} weight_t d_t / sum_{same t} weight_t` (no division for `combine: sum`).

    Shapes: deltas [models, *shape], threshold [models] -> merged delta [*shape].

    Knobs:
        weight: weight of each delta in the combination.
        density: share of entries kept, 1 keeps all (no trimming), 0 none (returns the base).
        scale: factor on the merged delta (the paper's lambda).
        scope: count the share within each tensor, or over all tensors of the model that the same settings merge.
        combine: mean over the agreeing models (the paper), or sum.
        weighted_election: weights count in the election already (mergekit), instead of after it.

    Source: Yadav et al. 2023 (arXiv 2306.01708), section 4; keeps the top 20 %.

    Deviations: every entry that ties with the k-th is kept (bfloat16 deltas tie often; the realised density is in the
    record), an exactly zero sum elects plus (the authors' code: the majority of all signs), the count is rounded down
    (theirs: one more), and the default scope is the tensor (theirs: the model).
    """
    kept = trim(deltas, threshold)
    return scale * disjoint(kept, weight, weighted_election=weighted_election, mean=combine == "mean")


@method(
    source="Yu et al. 2024, Language models are Super Mario (arXiv 2311.03099)",
    grain="element",
    kernel="graftkit.methods.kernels:dare",
)
def dare(
    deltas: "Tensor",
    rng: "Keyed",
    *,
    weight: Weight = 1.0,
    density: Density = 0.5,
    scale: Scale = 1.0,
    elect: Literal["none", "sign"] = "none",
    rescale: bool = True,
) -> "Tensor":
    """Drop entries of each delta at random, divide the rest by the share kept, then add them up.

    Formula: `d_t = mask_t * delta_t / density_t`, mask entries independent and 1 with probability `density_t`;
    `scale * sum_t weight_t d_t`, or TIES' election and disjoint mean of the `d_t` with `elect: sign`.

    Shapes: deltas [models, *shape] -> merged delta [*shape].

    Knobs:
        weight: weight of each delta.
        density: probability to keep an entry (1 minus the paper's drop rate); 1 keeps all, 0 returns the base.
        scale: factor on the merged delta.
        elect: `sign` combines only entries of the elected sign (the peers' dare_ties), `none` adds all (dare_linear).
        rescale: divide by the density, so that the expected delta is the full one.

    Source: Yu et al. 2024 (arXiv 2311.03099), section 3.

    Deviations: none; each entry is divided by the density itself (mergekit 0.1.5 rescales a tensor by one ratio of
    L1 norms, which is biased for small tensors), and masks are keyed by content, not drawn from a global generator.
    """
    kept = drop(deltas, rng.uniform(deltas), density, rescale)
    if elect == "none":
        return scale * weighted_sum(kept, weight)
    return scale * disjoint(kept, weight, weighted_election=False, mean=True)
