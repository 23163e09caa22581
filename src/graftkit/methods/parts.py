"""What several methods share, as small pure functions of tensors; and the statistics, on whole tensors.

Everything here is differentiable where its mathematics is, works in the dtype that it is given, and leaves its inputs
unchanged. The engine has its own block-wise twins of the statistics (`execution/reductions.py`); a test holds the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def per_model(value: float | Sequence[float], like: Tensor) -> Tensor:
    """A knob as a tensor that broadcasts over `like` [models, *shape]: shape [models, 1, ...]."""
    import torch

    values = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if values.ndim and values.shape[0] != like.shape[0]:
        raise ValueError(f"{values.shape[0]} values for {like.shape[0]} models")
    return values.expand(like.shape[0]).reshape(-1, *[1] * (like.ndim - 1))


def spread(value: float | Sequence[float], count: int) -> np.ndarray:
    """A knob as float64 numbers, one per model: [count]."""
    import numpy as np

    values = np.empty(count)
    values[:] = value
    return values


def kept_count(density: float, elements: int) -> int:
    """How many entries a density keeps: its share rounded down, at least one; none at density 0.

    The product is nudged by one part in 10^12 first, so that 0.29 of 100 is 29 although 0.29 * 100 < 29 in floats.
    """
    return max(1, min(elements, math.floor(density * elements * (1 + 1e-12)))) if density > 0 and elements else 0


def threshold_of(deltas: Tensor, density: float | Sequence[float]) -> Tensor:
    """Per model the k-th largest magnitude (in float32), k = `kept_count`; infinity at density 0, zero at density 1.

    Keeping all entries at or above it keeps the exact top k and what ties with the k-th. Shape [models].
    """
    import torch

    magnitudes = deltas.detach().abs().reshape(deltas.shape[0], -1).to(torch.float32)
    densities = per_model(density, deltas.detach().to(torch.float64)).reshape(-1).tolist()
    found = [_kth_largest(row, kept_count(d, row.numel())) for row, d in zip(magnitudes, densities, strict=True)]
    return torch.tensor(found, dtype=torch.float32, device=deltas.device)


def _kth_largest(magnitudes: Tensor, k: int) -> float:
    if k == 0:
        return math.inf
    if k >= magnitudes.numel():
        return 0.0
    return float(magnitudes.kthvalue(magnitudes.numel() - k + 1).values)


def band_ranks(density: float, outliers: float, elements: int) -> tuple[int, int]:
    """Ranks, from the largest magnitude, of the last and of the first entry that breadcrumbs keep; 0: no such bound.

    The share `density` is kept in any case: where both shares exceed the whole, fewer outliers go.
    """
    kept = kept_count(density, elements)
    removed = min(kept_count(outliers, elements) if outliers * elements >= 1 else 0, elements - kept)
    return (kept + removed, removed + 1 if removed else 0) if kept else (0, 0)


def band_of(deltas: Tensor, density: float | Sequence[float], outliers: float | Sequence[float]) -> Tensor:
    """Per model the smallest and the largest magnitude (float32) that breadcrumbs keep, [2, models]."""
    import torch

    magnitudes = deltas.abs().reshape(deltas.shape[0], -1).to(torch.float32)
    like = torch.zeros(deltas.shape[0], dtype=torch.float64)
    kept, removed = (per_model(value, like).tolist() for value in (density, outliers))
    ranks = [band_ranks(*pair, magnitudes.shape[1]) for pair in zip(kept, removed, strict=True)]
    found = [[_of_rank(row, pair[k]) for row, pair in zip(magnitudes, ranks, strict=True)] for k in (0, 1)]
    return torch.tensor(found, dtype=torch.float32, device=deltas.device)


def _of_rank(values: Tensor, rank: int) -> float:
    """The value of a rank, counted from 1 at the largest; infinity for rank 0."""
    return float(values.kthvalue(values.numel() - rank + 1).values) if rank else math.inf


def within(deltas: Tensor, band: Tensor) -> Tensor:
    """Zeroes every entry whose float32 magnitude lies outside its model's band [2, models]."""
    import torch

    lower, upper = band.reshape(2, -1, *[1] * (deltas.ndim - 1))
    magnitudes = deltas.abs().to(torch.float32)
    return torch.where((magnitudes >= lower) & (magnitudes <= upper), deltas, torch.zeros_like(deltas))


def overlap_of(deltas: Tensor, epsilon: float) -> Tensor:
    """Per model how many of its changed entries others change too, over how many it changes alone; float64 [models]."""
    import torch

    changed = deltas.abs().reshape(deltas.shape[0], -1) > epsilon
    shared = changed & (changed.sum(dim=0) > 1)
    return shared.sum(dim=1).to(torch.float64) / (changed & ~shared).sum(dim=1).clamp(min=1)


def deviation(stack: Any) -> Any:
    """Standard deviation over models, [models, n] float64 -> [n]; exactly 0 where all are equal.

    Of numpy arrays or of tensors, in the same bits: block-wise statistics and methods must agree on what they select.
    """
    shifted = [row - stack[0] for row in stack]
    mean = sum(shifted) / len(shifted)
    return (sum((row - mean) * (row - mean) for row in shifted) / len(shifted)) ** 0.5


def variation_of(deltas: Tensor, share: float) -> Tensor:
    """The deviation (float32) at or above which a share of the positions lies whose deviation is not 0; [1]."""
    import torch

    if share >= 1:
        return torch.zeros(1, device=deltas.device)
    deviations = deviation(deltas.to(torch.float64)).to(torch.float32).reshape(-1)
    wanted = kept_count(share, int((deviations > 0).sum()))
    return torch.tensor([_of_rank(deviations, wanted)], dtype=torch.float32, device=deltas.device)


def selected(deltas: Tensor, variation: Tensor) -> Tensor:
    """Zeroes all positions at which the models' deviation is below the variation [1]."""
    import torch

    deviations = deviation(deltas.detach().to(torch.float64)).to(torch.float32)
    return torch.where(deviations >= variation.reshape([1] * (deltas.ndim - 1)), deltas, torch.zeros_like(deltas))


def energies_of(deltas: Tensor, variation: Tensor) -> Tensor:
    """Per model the mean square of what is selected of it, over all positions, float64 [models]."""
    kept = selected(deltas, variation).double().reshape(deltas.shape[0], -1)
    return (kept * kept).sum(dim=1) / max(kept.shape[1], 1)


def retained_of(deltas: Tensor, kept: Tensor) -> Tensor:
    """Per model the share of its L1 norm that is left in `kept`; 1 where nothing is left, or was there; [models]."""
    import torch

    before, after = (part.detach().reshape(len(part), -1).abs().to(torch.float64).sum(dim=1) for part in (deltas, kept))
    return torch.where(after > 0, after / torch.where(before > 0, before, torch.ones_like(before)), 1.0)


def restored(kept: Tensor, retained: Tensor) -> Tensor:
    """Sparse deltas scaled to the L1 norms that they had, `retained` [models] being the shares left."""
    return kept / per_model(retained, kept)  # type: ignore[arg-type]


def statistic(name: str, stack: Tensor, knobs: Mapping[str, Any]) -> Tensor:
    """A tensor-scope statistic by name (`methods.STATISTICS`), of whole tensors `stack` [models, *shape].

    Methods take it as a constant: no gradient goes through it.
    """
    import torch

    stack = stack.detach()
    if name == "threshold":
        return threshold_of(stack, knobs["density"])
    if name == "band":
        return band_of(stack, knobs["density"], knobs["outliers"])
    if name == "overlap":
        return overlap_of(stack, knobs["epsilon"])
    if name == "variation":
        return variation_of(stack, knobs["select_topk"])
    if name == "energies":
        return energies_of(stack, variation_of(stack, knobs["select_topk"]))
    if name in ("range", "histogram", "distance", "signals"):
        return _distribution(name, stack, knobs)
    flat = stack.reshape(stack.shape[0], -1).to(torch.float64)
    return flat.norm(dim=1) if name == "norms" else flat @ flat.T


def _distribution(name: str, stack: Tensor, knobs: Mapping[str, Any]) -> Tensor:
    """The statistics of `signals.py`."""
    from graftkit.methods import signals

    if name == "histogram":
        return signals.histogram_of(stack, knobs["bins"], knobs["last_bin"])
    if name == "signals":
        return signals.signals_of(stack, knobs)
    return signals.range_of(stack) if name == "range" else signals.distance_of(stack)


def trim(deltas: Tensor, threshold: Tensor) -> Tensor:
    """Zeroes every entry whose float32 magnitude is below its model's threshold [models]."""
    import torch

    limits = threshold.reshape(-1, *[1] * (deltas.ndim - 1))
    return torch.where(deltas.abs().to(torch.float32) >= limits, deltas, torch.zeros_like(deltas))


def reaches(deltas: Tensor, threshold: Tensor) -> Tensor:
    """Where the float32 magnitude is at or above its model's threshold [models]."""
    return deltas.abs().to(threshold.dtype) >= threshold.reshape(-1, *[1] * (deltas.ndim - 1))


def drop(deltas: Tensor, uniform: Tensor, density: float | Sequence[float], rescale: bool) -> Tensor:
    """Keeps an entry where its uniform number (float64, as `deltas`) is below the density, divided by it if asked."""
    import torch

    kept = torch.where(uniform < per_model(density, uniform), deltas, torch.zeros_like(deltas))
    share = per_model(density, deltas)
    return kept / torch.where(share > 0, share, torch.ones_like(share)) if rescale else kept


def weighted_sum(stack: Tensor, weight: float | Sequence[float]) -> Tensor:
    """`sum_t weight_t * stack_t`, [models, *shape] -> [*shape], added in the models' order."""
    weights = per_model(weight, stack)
    total = weights[0] * stack[0]
    for t in range(1, stack.shape[0]):
        total = total + weights[t] * stack[t]
    return total


def combined(
    deltas: Tensor,
    weight: float | Sequence[float],
    *,
    elect: str,
    normalize: bool,
    combine: str,
    weighted_election: bool,
) -> Tensor:
    """The weighted sum or mean of sparse deltas (`elect: none`), or TIES' election among them (`sign`)."""
    if elect == "none":
        total = weighted_sum(deltas, weight)
        return total / per_model(weight, deltas).sum() if normalize else total
    return disjoint(deltas, weight, weighted_election=weighted_election, mean=combine == "mean")


def disjoint(deltas: Tensor, weight: float | Sequence[float], *, weighted_election: bool, mean: bool) -> Tensor:
    """TIES' election: per entry the sign of the sum of all deltas wins, and only deltas of that sign are combined.

    `weighted_election`: whether deltas go to the vote times their weights, a negative one changing sides. `mean`:
    divide by the sum of the agreeing models' weights (disjoint mean), else sum. An exactly zero sum elects plus; a zero
    delta agrees with nobody.
    """
    import torch

    weights = per_model(weight, deltas)
    votes = weighted_sum(deltas, weight if weighted_election else 1.0)
    sign = torch.where(votes >= 0, torch.ones_like(votes), -torch.ones_like(votes))
    sides = torch.where(weights < 0, -1.0, 1.0) if weighted_election else torch.ones_like(weights)
    agrees = torch.sign(deltas) * sides == sign
    total = weighted_sum(torch.where(agrees, deltas, torch.zeros_like(deltas)), weight)
    if not mean:
        return total
    share = (weights * agrees).sum(dim=0)
    return total / torch.where(share == 0, torch.ones_like(share), share)
