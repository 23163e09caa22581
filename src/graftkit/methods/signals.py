"""What a graft looks at in a matrix: where its values lie, how evenly they are spread, how far two matrices are apart.

On whole tensors here; the engine has block-wise twins (`execution/signals.py`), and a test holds the two. Where values
are put into bins both compare with the same edges, so their counts are equal, not close.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SMALLEST, LARGEST = 1, 256
"""Fewest and most bins of a histogram."""


def edges_of(span: np.ndarray, bins: int, last_bin: str) -> np.ndarray:
    """The edges of equal bins between the smallest and the largest value, [2, models] -> float64 [models, bins + 1].

    `closed` bins are numpy's. `open` ones are those of the ancestors' code: in float32, `low + k * step`, the last
    without its upper edge.
    """
    import numpy as np

    with np.errstate(all="ignore"):  # a range beyond the largest number has no edges, and puts nothing into bins
        if last_bin == "closed":
            return np.linspace(span[0], span[1], bins + 1, axis=1)  # type: ignore[no-any-return]
        low, high = span.astype(np.float32)
        step = (high - low) / np.float32(bins)
        return (low[:, None] + np.arange(bins + 1, dtype=np.float32) * step[:, None]).astype(np.float64)


def counts_of(reached: np.ndarray, last_bin: str) -> np.ndarray:
    """How many values lie in each bin, from how many reach each edge: [models, bins + 1] -> [models, bins]."""
    import numpy as np

    above = np.array(reached[:, 1:])
    if last_bin == "closed":
        above[:, -1] = 0
    return np.maximum(reached[:, :-1] - above, 0)


def entropy_of(histogram: np.ndarray, elements: int) -> np.ndarray:
    """`-sum_k p_k log p_k` in nats, p_k the share of all elements in bin k: [models, bins] -> float64 [models]."""
    import numpy as np

    shares = histogram / max(elements, 1)
    return -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(axis=1)  # type: ignore[no-any-return]


def range_of(stack: Tensor) -> Tensor:
    """The smallest and the largest value of each model, zeros where there is none: float64 [2, models]."""
    import torch

    flat = stack.reshape(len(stack), -1).to(torch.float64)
    if not flat.shape[1]:
        return torch.zeros(2, len(stack), dtype=torch.float64, device=stack.device)
    return torch.stack([flat.amin(dim=1), flat.amax(dim=1)])


def histogram_of(stack: Tensor, bins: int, last_bin: str) -> Tensor:
    """How many values of each model lie in each of its own bins (`edges_of`): float64 [models, bins]."""
    import torch

    edges = torch.from_numpy(edges_of(range_of(stack).cpu().numpy(), bins, last_bin)).to(stack.device)
    flat = stack.reshape(len(stack), -1).to(torch.float64)
    reached = torch.stack([(flat >= edge[:, None]).sum(dim=1) for edge in edges.unbind(1)], dim=1)
    counts = counts_of(reached.cpu().numpy(), last_bin)
    return torch.from_numpy(counts).to(stack.device, torch.float64)


def distance_of(stack: Tensor) -> Tensor:
    """Per output channel the L1 distance of each model from the mean of the others: float64 [models, out].

    For two models that is `sum_j |W_b - W_g|`, the same for both. A vector is one channel.
    """
    rows = stack.shape[1] if stack.ndim > 2 else 1
    wide = stack.reshape(len(stack), rows, stack[0].numel() // max(rows, 1)).double()
    others = (wide.sum(dim=0) - wide) / max(len(wide) - 1, 1)
    return (wide - others).abs().sum(dim=2)


def spectral_of(stack: Tensor) -> Tensor:
    """The largest singular value of each matrix, dimensions after the first taken together: float64 [models]."""
    import torch

    wide = stack.detach().reshape(*stack.shape[:2], -1).to(torch.float64)
    if not wide.numel():
        return torch.zeros(len(wide), dtype=torch.float64, device=wide.device)
    return torch.linalg.matrix_norm(wide, ord=2)


def signals_of(stack: Tensor, knobs: Mapping[str, Any]) -> Tensor:
    """What the knob `global_signal` names of each model: entropy, spectral norm, or zeros; float64 [models].

    Zeros too for a tensor that is no matrix: a norm or a bias has no channels to choose between.
    """
    import torch

    if knobs["global_signal"] == "none" or stack.ndim < 3:
        return torch.zeros(len(stack), dtype=torch.float64, device=stack.device)
    if knobs["global_signal"] == "spectral":
        return spectral_of(stack)
    counts = histogram_of(stack, knobs["bins"], knobs["last_bin"]).cpu().numpy()
    return torch.from_numpy(entropy_of(counts, stack[0].numel())).to(stack.device)
