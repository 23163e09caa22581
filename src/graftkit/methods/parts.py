"""What several methods share, as small pure functions of tensors; and the statistics, on whole tensors.

Everything here is differentiable where its mathematics is, works in the dtype that it is given, and leaves its inputs
unchanged. The engine has its own block-wise twins of the statistics (`execution/reductions.py`); a test holds the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def per_model(value: float | Sequence[float], like: Tensor) -> Tensor:
    """A knob as a tensor that broadcasts over `like` [models, *shape]: shape [models, 1, ...]."""
    import torch

    values = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if values.ndim and values.shape[0] != like.shape[0]:
        raise ValueError(f"{values.shape[0]} values for {like.shape[0]} models")
    return values.expand(like.shape[0]).reshape(-1, *[1] * (like.ndim - 1))


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
    densities = per_model(density, deltas).reshape(-1).tolist()
    found = [_kth_largest(row, kept_count(d, row.numel())) for row, d in zip(magnitudes, densities, strict=True)]
    return torch.tensor(found, dtype=torch.float32, device=deltas.device)


def _kth_largest(magnitudes: Tensor, k: int) -> float:
    if k == 0:
        return math.inf
    if k >= magnitudes.numel():
        return 0.0
    return float(magnitudes.kthvalue(magnitudes.numel() - k + 1).values)


def statistic(name: str, stack: Tensor, knobs: Mapping[str, Any]) -> Tensor:
    """A tensor-scope statistic by name (`methods.STATISTICS`), of whole tensors `stack` [models, *shape].

    Methods take it as a constant: no gradient goes through it.
    """
    if name == "threshold":
        return threshold_of(stack, knobs["density"])
    import torch

    flat = stack.detach().reshape(stack.shape[0], -1).to(torch.float64)
    return flat.norm(dim=1) if name == "norms" else flat @ flat.T


def trim(deltas: Tensor, threshold: Tensor) -> Tensor:
    """Zeroes every entry whose float32 magnitude is below its model's threshold [models]."""
    import torch

    limits = threshold.reshape(-1, *[1] * (deltas.ndim - 1))
    return torch.where(deltas.abs().to(torch.float32) >= limits, deltas, torch.zeros_like(deltas))


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


def disjoint(deltas: Tensor, weight: float | Sequence[float], *, weighted_election: bool, mean: bool) -> Tensor:
    """TIES' election: per entry the sign of the sum of all deltas wins, and only deltas of that sign are combined.

    `weighted_election`: whether the weights count in the sum that elects. `mean`: divide by the sum of the agreeing
    models' weights (disjoint mean), else sum. An exactly zero sum elects plus; a zero delta agrees with nobody.
    """
    import torch

    weights = per_model(weight, deltas)
    votes = weighted_sum(deltas, weight if weighted_election else 1.0)
    sign = torch.where(votes >= 0, torch.ones_like(votes), -torch.ones_like(votes))
    agrees = torch.sign(deltas) == sign
    total = weighted_sum(torch.where(agrees, deltas, torch.zeros_like(deltas)), weight)
    if not mean:
        return total
    share = (weights * agrees).sum(dim=0)
    return total / torch.where(share == 0, torch.ones_like(share), share)
