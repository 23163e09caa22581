"""Masks: which entry of which delta goes in, decided entry by entry."""

from typing import TYPE_CHECKING, Annotated, Literal

from graftkit.methods import PerModel, Range, method
from graftkit.methods.parts import per_model, reaches, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

Weight = Annotated[PerModel, Range(search=(0, 1))]
Density = Annotated[PerModel, Range(0, 1)]
Scale = Annotated[float, Range(search=(0, 2))]

ROWS = 1 << 16  # entries of a tensor whose softmax is computed at once, in whole rows


@method(
    source="alchemonaut 2024, QuartetAnemoi-70B-t0.0001 (model card on the Hugging Face hub)",
    grain="element",
    model_count=(1, 1),
    kernel="graftkit.methods.kernels:nearswap",
)
def nearswap(deltas: "Tensor", *, t: Annotated[float, Range(0, search=(0, 0.01))] = 1e-4) -> "Tensor":
    """Moves every weight of the base towards the model's, by at most t: takes over what is near already.

    Formula: `sign(delta) min(|delta|, t)`.

    Shapes: deltas [1, *shape] -> merged delta [*shape].

    Knobs:
        t: longest step of a weight, in the weights' unit; 0 returns the base, the largest delta or more the model.

    Source: the model card of alchemonaut/QuartetAnemoi-70B-t0.0001; mergekit 0.1.5, method `nearswap`.

    Deviations: none for differences above 1e-6, below which mergekit moves a smaller part than t allows.

    Use it when: the base is to be touched up by one model: small differences are taken whole, large ones cut.

    Example: the step of 2 is cut to 0.5; the others are not larger.
        >>> get("nearswap").run(base=base, models=models[:1], t=0.5)
        tensor([1.5000, 0.5000, 1.2500, 1.0000])
    """
    return deltas[0].clamp(-t, t)


@method(source="RAM, Reinforced Agent Merging, 2026 (arXiv 2601.13572)", grain="element")
def ram(
    deltas: "Tensor",
    overlap: "Tensor",
    *,
    epsilon: Annotated[float, Range(0, search=(0, 1e-4))] = 1e-5,
    r: Annotated[float, Range(0, search=(0, 0.5))] = 0.0,
    alpha: Annotated[float, Range(0, search=(0, 1))] = 0.2,
) -> "Tensor":
    """Adds what one model alone changed whole, and averages what several changed over those who did.

    Formula: `sum_t lambda_t delta_t` where one model changed the entry, the mean of the changed deltas where several
    did; `lambda_t = 1 + r min(rho_t, alpha)` with rho_t the ratio of t's shared to its unshared changed entries.

    Shapes: deltas [models, *shape], overlap [models] -> merged delta [*shape].

    Knobs:
        epsilon: magnitude, in the weights' unit, up to which an entry counts as unchanged; 0 counts every change.
        r: how much unshared entries grow for the averaging of shared ones; 0 is RAM, the paper's RAM+ has 0.1.
        alpha: largest ratio that counts for this; 0 is RAM again.

    Source: arXiv 2601.13572 as implemented by mergekit 0.1.5, methods `ram` and `ramplus_tl`.

    Deviations: ratios are counted within the tensor (mergekit's tensor-local form), not over the whole model.

    Use it when: each model changes entries that no other does (sparse deltas, as of reinforcement learning), which
    an average would dilute by models that left them alone.

    Example: the first two entries were changed by both and are averaged; the last two by one each, and go in whole.
        >>> get("ram").run(base=base, models=models)
        tensor([2.5000, 1.2500, 1.2500, 0.0000])
    """
    import torch

    changed = deltas.abs() > epsilon
    count = changed.sum(dim=0)
    gain = 1 + r * per_model(overlap.clamp(max=alpha), deltas)  # type: ignore[arg-type]
    share = torch.where(count == 1, gain, 1 / count.clamp(min=1).to(deltas.dtype))
    return weighted_sum(torch.where(changed, share * deltas, torch.zeros_like(deltas)), 1.0)


@method(
    source="Wang et al. 2024, Localizing task information for improved model merging (arXiv 2405.07813)",
    grain="element",
)
def consensus_ta(
    deltas: "Tensor",
    *,
    weight: Weight = 1.0,
    scale: Scale = 1.0,
    selectivity: Annotated[PerModel, Range(0, search=(0.2, 0.6))] = 0.4,
    agreement: Annotated[int, Range(0, 1000, search=(1, 3))] = 2,
) -> "Tensor":
    """Task arithmetic without the entries that too few of the models need.

    Formula: `scale * tau` where at least `agreement` models need the entry, else 0; `tau = sum_t weight_t delta_t`,
    and model t needs it if `|weight_t delta_t| > selectivity_t |tau - weight_t delta_t|`.

    Shapes: deltas [models, *shape] -> merged delta [*shape].

    Knobs:
        weight: factor of each delta, before the masks.
        scale: factor on the merged delta (the papers' alpha).
        selectivity: how large a model's own part of an entry must be beside the others' (the paper's lambda); 0: any.
        agreement: how many models must need an entry (the paper's k); 0 is task arithmetic, 2 also drops what only one
            needs, more than there are models gives the base.

    Source: Wang et al. 2024 (arXiv 2405.07813), TALL masks and Consensus merging.

    Deviations: the paper chooses lambda for each task on validation data, from 0.2 to 0.6; the default is ours.

    Use it when: many models are added up, and what only one of them needs is taken for selfish or noise. With few
    models much is dropped: two models keep only what both need.

    Example: the last two entries were changed by one model each, and stay the base's.
        >>> get("consensus_ta").run(base=base, models=models)
        tensor([4.0000, 1.5000, 1.0000, 1.0000])
    """
    import torch

    own = per_model(weight, deltas) * deltas
    total = weighted_sum(own, 1.0)
    needed = own.abs() > per_model(selectivity, deltas) * (total - own).abs()
    return scale * torch.where(needed.sum(dim=0) >= agreement, total, torch.zeros_like(total))


@method(
    source="He et al. 2024, Localize-and-Stitch: Efficient model merging via sparse task arithmetic (arXiv 2408.13656)",
    grain="element",
)
def localize_and_stitch(
    deltas: "Tensor",
    threshold: "Tensor",
    *,
    weight: Weight = 1.0,
    density: Density = 0.05,
    scale: Scale = 1.0,
    scope: Literal["tensor", "model"] = "model",
) -> "Tensor":
    """Keeps the largest entries of each delta, and averages where several models kept one.

    Formula: `scale * sum_t weight_t m_t delta_t / sum_t weight_t m_t`, the mask m_t 1 where the magnitude of delta_t is
    among the top `density`, else 0.

    Shapes: deltas [models, *shape], threshold [models] -> merged delta [*shape].

    Knobs:
        weight: share of each model where several kept an entry.
        density: share of entries kept, 1 gives the average of the deltas, 0 the base.
        scale: factor on the merged delta.
        scope: count the share over all tensors that the same settings merge (the paper), or within each tensor.

    Source: He et al. 2024 (arXiv 2408.13656), the data-free form: 5 % for language, 10 % for vision.

    Deviations: every entry that ties with the k-th is kept; there are no trained masks.

    Use it when: the skills are taken to lie in a small share of each delta, and the rest should stay the base's.

    Example: one entry of the first delta is kept, and of the second the three that tie; both have the first entry,
    and it is averaged.
        >>> get("localize_and_stitch").run(base=base, models=models, density=0.25)
        tensor([2.5000, 2.0000, 1.0000, 0.0000])
    """
    import torch

    weights = per_model(weight, deltas) * reaches(deltas, threshold)
    share = weighted_sum(weights, 1.0)
    total = weighted_sum(weights * deltas, 1.0)
    return scale * total / torch.where(share == 0, torch.ones_like(share), share)


@method(source="Arcee AI 2024, Arcee Fusion; mergekit, method `arcee_fusion`", grain="tensor", model_count=(1, 1))
def arcee_fusion(base: "Tensor", deltas: "Tensor") -> "Tensor":
    """Takes over the entries of one model that matter most, by how far they and their row's softmax moved.

    Formula: `W_0 + m delta` with the mask m 1 where `|delta| KL(softmax(row of W) || softmax(row of W_0))` is at least
    its median over the tensor plus 1.5 times its interquartile range, else 0. Where more than three quarters of the
    entries do not matter at all, that is 0, and all are taken.

    Shapes: base [*shape], deltas [1, *shape] -> weights [*shape]; rows run along the last axis.

    Knobs: none; the quartiles decide.

    Source: mergekit 0.1.5, method `arcee_fusion`; no paper.

    Deviations: quartiles are exact (mergekit: of a random million entries), and the divergence has no floor of 1e-8
    under its probabilities.

    Use it when: the most important changes of one tuned model are to go into the base, without a knob to choose.

    Example: only the entry that moved by 2 stands out.
        >>> get("arcee_fusion").run(base=base, models=models[:1])
        tensor([3., 1., 1., 1.])
    """
    import torch

    importance = _importance(base.detach(), deltas[0].detach())
    low, middle, high = _quartiles(importance)
    kept = importance >= middle + 1.5 * (high - low)
    return base + torch.where(kept, deltas[0], torch.zeros_like(base))


def _importance(base: "Tensor", delta: "Tensor") -> "Tensor":
    """Magnitude of each entry times its row's divergence, divided by the largest divergence: only ratios count."""
    import torch

    width = max(base.shape[-1] if base.ndim else 1, 1)
    old, change = base.reshape(-1, width), delta.reshape(-1, width)
    size = max(ROWS // width, 1)
    parts = zip(old.split(size), change.split(size), strict=True)
    found = torch.cat([_divergence(o.double(), o.double() + c.double()) for o, c in parts])
    largest = found.max() if found.numel() else found.new_ones(())
    relative = found / torch.where(largest > 0, largest, torch.ones_like(largest))
    return (change.abs() * relative.to(change.dtype)[:, None]).reshape(base.shape)


def _divergence(old: "Tensor", new: "Tensor") -> "Tensor":
    """KL(softmax(new) || softmax(old)) of each row; not below 0, where only rounding leads."""
    before, after = old.log_softmax(dim=-1), new.log_softmax(dim=-1)
    return (after.exp() * (after - before)).sum(dim=-1).clamp(min=0)


def _quartiles(values: "Tensor") -> list[float]:
    """The values a quarter, a half and three quarters of the way up, rounded down to one that is there."""
    flat, last = values.reshape(-1), values.numel() - 1
    return [float(flat.kthvalue(k * last // 4 + 1).values) for k in (1, 2, 3)] if last >= 0 else [0.0] * 3
