"""PEFT's combinations of adapters, as `add_weighted_adapter` makes them, and RobustMerge: by default of the factors.

A merge of factors is not a merge of what the adapters do: `(sum_t B_t)(sum_t A_t)` holds every product of one adapter's
B with another's A, so two copies of an adapter at weight 0.5 come out doubled, and an adapter with the signs of both
its factors turned, which does the same, cancels its twin. It makes sense only where the adapters share their A. With
`of: product` the same rule runs on the adapters' deltas, which is PEFT's `svd` family. `cat` and `svd` themselves are
`task_arithmetic` with `output.rank` `exact` or a number.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from graftkit.methods import PerModel, Range, method
from graftkit.methods.parts import drop, per_model, threshold_of, trim, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

    from graftkit.methods.random import Keyed

Weight = Annotated[PerModel, Range(search=(0, 1))]
Density = Annotated[PerModel, Range(0, 1)]
Of = Literal["factors", "product"]
Sign = Literal["total", "frequency"]


@method(source="PEFT 0.21.2, `add_weighted_adapter`, type `linear`", grain="element")
def peft_linear(deltas: "Tensor", *, weight: Weight = 1.0, of: Of = "factors") -> "Tensor":
    """PEFT's `linear`: the weighted sum of the adapters' factors A, and of their factors B.

    Formula: `A = sum_t sign(w_t s_t) sqrt|w_t s_t| A_t` and `B = sum_t sqrt|w_t s_t| B_t`, s the adapters' scales.

    Shapes: factors [models, *shape] -> merged factor [*shape]; deltas with `of: product`.

    Knobs:
        weight: weight of each adapter; 0 leaves it out, negative values subtract it, with all cross terms.
        of: `factors` merges A and B each by itself, `product` their products, which is task arithmetic.

    Source: PEFT 0.21.2, `LoraModel.add_weighted_adapter`, combination type `linear`.

    Deviations: none in the numbers; an adapter with rsLoRA keeps its scale (PEFT 0.21.2 inflates the result).

    Use it when: an adapter is to come out as PEFT's `linear` makes it. To add up what adapters do, without the
    cross terms, take `task_arithmetic` with `output: {as: adapter}`.

    Example: the deltas stand for one factor of two adapters.
        >>> get("peft_linear").run(base=base, models=models, weight=[1, 0.5])
        tensor([3.5000, 1.0000, 1.2500, 0.5000])
    """
    return weighted_sum(deltas, weight)


@method(source="PEFT 0.21.2, `add_weighted_adapter`, type `magnitude_prune`", grain="element")
def peft_magnitude_prune(
    deltas: "Tensor", threshold: "Tensor", *, weight: Weight = 1.0, density: Density = 0.5, of: Of = "factors"
) -> "Tensor":
    """PEFT's `magnitude_prune`: the largest entries of each adapter's factors, added up.

    Formula: each factor without what is below its top `density` by magnitude, then as `peft_linear`.

    Shapes: factors [models, *shape], threshold [models] -> merged factor [*shape]; deltas with `of: product`.

    Knobs:
        weight: weight of each adapter.
        density: share of entries kept of each factor; 1 keeps all, 0 none.
        of: `factors` merges A and B each by itself, `product` their products (PEFT's `magnitude_prune_svd`).

    Source: PEFT 0.21.2, `LoraModel.add_weighted_adapter`, combination type `magnitude_prune`.

    Deviations: every entry that ties with the k-th is kept; rsLoRA as for `peft_linear`.

    Use it when: an adapter is to come out as PEFT's `magnitude_prune` makes it, or its `magnitude_prune_svd` with
    `of: product`.

    Example: the deltas stand for one factor of two adapters: of the first 2 and -0.5 are kept, of the second the
    three that tie.
        >>> get("peft_magnitude_prune").run(base=base, models=models, density=0.5)
        tensor([4.0000, 1.5000, 1.0000, 0.0000])
    """
    return weighted_sum(trim(deltas, threshold), weight)


@method(source="PEFT 0.21.2, `add_weighted_adapter`, type `ties`", grain="element")
def peft_ties(
    deltas: "Tensor",
    threshold: "Tensor",
    *,
    weight: Weight = 1.0,
    density: Density = 0.5,
    majority: Sign = "total",
    of: Of = "factors",
) -> "Tensor":
    """PEFT's `ties`: trim each adapter's factors, elect a sign per entry, average what agrees with it.

    Formula: `d_t` the trimmed factor, `s = sign(sum_t d_t)`; `sum_{t: sign(d_t) = s} w_t d_t / |{t: sign(d_t) = s}|`.

    Shapes: factors [models, *shape], threshold [models] -> merged factor [*shape]; deltas with `of: product`.

    Knobs:
        weight: weight of each adapter, after the election; the divisor counts adapters, not weights.
        density: share of entries kept of each factor; 1 keeps all, 0 none.
        majority: elect by the sum of the entries (`total`) or of their signs (`frequency`).
        of: `factors` merges A and B each by itself, `product` their products (PEFT's `ties_svd`).

    Source: PEFT 0.21.2, `LoraModel.add_weighted_adapter`, combination type `ties`.

    Deviations: as for `peft_magnitude_prune`.

    Use it when: an adapter is to come out as PEFT's `ties` makes it, or its `ties_svd` with `of: product`.

    Example: the deltas stand for one factor of two adapters. In the first entry both agree, and (2 + 0.5 * 1) / 2
    goes in.
        >>> get("peft_ties").run(base=base, models=models, density=0.5, weight=[1, 0.5])
        tensor([2.2500, 1.5000, 1.0000, 0.5000])
    """
    return _disjoint_mean(trim(deltas, threshold), weight, majority)


@method(source="PEFT 0.21.2, `add_weighted_adapter`, types `dare_linear` and `dare_ties`", grain="element")
def peft_dare(
    deltas: "Tensor",
    rng: "Keyed",
    *,
    weight: Weight = 1.0,
    density: Density = 0.5,
    elect: Literal["none", "sign"] = "none",
    majority: Sign = "total",
    of: Of = "factors",
) -> "Tensor":
    """PEFT's `dare_linear` and `dare_ties`: drop entries of each adapter's factors at random, rescale the rest, add up.

    Formula: `d_t = mask_t * factor_t / density_t`, then as `peft_linear`, or with `elect: sign` as `peft_ties`.

    Shapes: factors [models, *shape] -> merged factor [*shape]; deltas with `of: product`.

    Knobs:
        weight: weight of each adapter.
        density: probability to keep an entry; 1 keeps all, 0 none.
        elect: `none` is PEFT's `dare_linear`, `sign` its `dare_ties`.
        majority: elect by the sum of the entries (`total`) or of their signs (`frequency`).
        of: `factors` merges A and B each by itself, `product` their products (PEFT's two types with `_svd`).

    Source: PEFT 0.21.2, `LoraModel.add_weighted_adapter`, combination types `dare_linear` and `dare_ties`.

    Deviations: masks are keyed by content, not drawn from a global generator; rsLoRA as for `peft_linear`.

    Use it when: an adapter is to come out as PEFT's `dare_linear` or `dare_ties` makes it, but for the draw of the
    masks.

    Example: the deltas stand for one factor of two adapters: this seed keeps 2 and 0.25 of the first and the first
    1 of the second; each is doubled.
        >>> from graftkit.methods.random import Keyed
        >>> rng = Keyed.of(seed=3, models=2)
        >>> get("peft_dare").run(base=base, models=models, rng=rng, density=0.5)
        tensor([7.0000, 1.0000, 1.5000, 1.0000])
    """
    kept = drop(deltas, rng.uniform(deltas), density, True)
    return weighted_sum(kept, weight) if elect == "none" else _disjoint_mean(kept, weight, majority)


def merged_directions(
    a: "Tensor", b: "Tensor", roots: "tuple[Tensor, Tensor]", *, density: PerModel, scale: float, weakest: float
) -> "tuple[Tensor, Tensor]":
    """RobustMerge on factors A [models, rank, in] and B [models, out, rank], each to be multiplied by its root."""
    import torch

    kept_a, kept_b = (trim(half, threshold_of(half, density)) for half in (a, b))
    left = kept_a.abs().sum(dim=2)  # [models, rank]
    strength = torch.where(left > 0, a.abs().sum(dim=2) / torch.where(left > 0, left, 1), 0)
    strength = torch.maximum(strength, torch.quantile(strength, weakest, dim=1, keepdim=True))
    total = strength.sum(dim=0)
    shares = strength / torch.where(total > 0, total, 1)
    merged_a = (roots[0][:, None, None] * kept_a).sum(dim=0)
    return scale * merged_a, scale * (roots[1][:, None, None] * shares[:, None, :] * kept_b).sum(dim=0)


@method(source="Zeng et al. 2025, RobustMerge (arXiv 2502.17159)", grain="element", halves=merged_directions)
def robustmerge(
    deltas: "Tensor",
    threshold: "Tensor",
    *,
    weight: Weight = 1.0,
    density: Density = 0.2,
    scale: Annotated[float, Range(search=(0, 3))] = 2.0,
    weakest: Annotated[float, Range(0, 1)] = 0.8,
    of: Of = "factors",
) -> "Tensor":
    """Keep the largest entries of the adapters' factors, and make up for what each direction lost by that.

    Formula: with A_t, B_t trimmed to A'_t, B'_t: `s_t = sum_j |A_t| / sum_j |A'_t|` for each of the ranks' directions,
    at least their quantile `weakest`; `A = scale * sum_t A'_t`, `B = scale * sum_t s_t B'_t / sum_t s_t`.

    Shapes: factors [models, *shape], threshold [models] -> merged factor [*shape]; deltas with `of: product`.

    Knobs:
        weight: weight of each adapter; its root goes to either factor.
        density: share of entries kept of each factor; 1 keeps all, 0 returns the base.
        scale: factor on the merged A and on the merged B; 0 returns the base.
        weakest: quantile of an adapter's s below which none stays; 0 leaves s as it is, 1 makes all equal.
        of: `factors` merges A and B, `product` their products, without directions: `scale^2 * sum_t` of what is kept.

    Source: Zeng et al. 2025 (arXiv 2502.17159) with the numbers of the authors' code: the largest fifth, twice the
    sum, the quantile 0.8.

    Deviations: every entry that ties with the k-th is kept; a direction of which nothing is kept gets the least s.

    Use it when: results are to be compared with the paper's. Like all merges of factors it holds products of one
    adapter's B with another's A, and depends on how each adapter splits its delta; `task_arithmetic` and
    `core_regmean` do not.

    Example: the deltas stand for the products of two adapters, of which the two largest entries are kept.
        >>> get("robustmerge").run(base=base, models=models, density=0.5, scale=1, of="product")
        tensor([4.0000, 1.5000, 1.0000, 0.0000])
    """
    return scale * scale * weighted_sum(trim(deltas, threshold), weight)


def _disjoint_mean(kept: "Tensor", weight: PerModel, majority: str) -> "Tensor":
    """PEFT's disjoint merge [models, *shape] -> [*shape]; a zero agrees with nobody, a tied vote elects plus."""
    import torch

    votes = kept.sum(dim=0) if majority == "total" else torch.sign(kept).sum(dim=0)
    agrees = torch.sign(kept) == torch.where(votes >= 0, torch.ones_like(votes), -torch.ones_like(votes))
    total = (per_model(weight, kept) * torch.where(agrees, kept, torch.zeros_like(kept))).sum(dim=0)
    return total / agrees.sum(dim=0).clamp(min=1)
