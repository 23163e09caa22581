"""Second moments of what linear layers get: added up while a model runs, in one of three forms.

full        all of `sum x x^T`; only one half of it is computed
block:128   its diagonal blocks of 128 inputs each
sketch:256  `sum x (x^T S)` for 256 fixed random directions S, and the diagonal: from these a matrix of rank 256
            (Nystrom's) plus what it lacks on the diagonal, nothing that is larger than a layer's inputs times 256
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Protocol

from graftkit.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

LEAF = 96  # width up to which a matrix is computed whole
FLOOR = 1e-6  # of a sketch: directions with a smaller share of the largest moment are left to the diagonal


class Moments(Protocol):
    """Second moments in the making."""

    tokens: int

    def add(self, inputs: Tensor) -> None:
        """Takes inputs [tokens, in] into account."""

    def mean(self) -> np.ndarray:
        """The mean over tokens, as it is stored."""


def checked_form(form: str) -> str:
    """A form as it is stored. Raises DataError for anything else."""
    if form == "full" or re.fullmatch(r"(block|sketch):[1-9]\d{0,5}", form):
        return form
    raise DataError(f"--gram: got {form!r}, expected full, block:SIZE (such as block:128) or sketch:RANK (sketch:256)")


def check_width(form: str, widest: int) -> None:
    """Refuses blocks and sketches that take more room than whole matrices do; `widest` is 0 where there are none."""
    if 0 < widest < int(form.partition(":")[2] or 0):
        raise DataError(f"--gram: {form} is larger than the widest layer, of {widest} inputs; take full")


def moments_of(form: str, width: int, device: Any, dtype: str = "float32") -> Moments:
    """Empty moments of a form, for a layer with so many inputs."""
    kind, _, number = form.partition(":")
    if kind == "full":
        return Full(width, device, dtype)
    return Blocks(width, int(number), device) if kind == "block" else Sketch(width, int(number), device)


def stored_shape(form: str, width: int) -> tuple[int, ...]:
    """The shape of what is stored for a layer with so many inputs."""
    kind, _, number = form.partition(":")
    if kind == "full":
        return width, width
    return (-(-width // int(number)), int(number), int(number)) if kind == "block" else (width, int(number) + 1)


class Full:
    """All second moments, [in, in]."""

    def __init__(self, width: int, device: Any, dtype: str = "float32") -> None:
        import torch

        self.tokens = 0
        self.total = torch.zeros((width, width), dtype=getattr(torch, dtype), device=device)

    def add(self, inputs: Tensor) -> None:
        """Only the upper half; what lies below the diagonal is its mirror image."""
        _add_half(self.total, inputs.to(self.total.dtype))
        self.tokens += len(inputs)

    def mean(self) -> np.ndarray:
        """Exactly symmetric, [in, in]."""
        upper = self.total.triu()
        return (upper.add(upper.triu(1).T) / max(self.tokens, 1)).cpu().numpy()


def _add_half(total: Tensor, inputs: Tensor) -> None:
    """Adds the upper half of `inputs^T inputs`: one product for the corner, and so on."""
    width = len(total)
    if width <= LEAF:
        total.addmm_(inputs.T, inputs)
        return
    half = -(-width // 64) * 32
    first, second = inputs[:, :half], inputs[:, half:]
    total[:half, half:].addmm_(first.T, second)
    _add_half(total[:half, :half], first)
    _add_half(total[half:, half:], second)


class Blocks:
    """The diagonal blocks of second moments, [blocks, size, size]."""

    def __init__(self, width: int, size: int, device: Any) -> None:
        import torch

        self.tokens, self.size = 0, size
        count = -(-width // size)
        self.missing = count * size - width
        self.total = torch.zeros((count, size, size), device=device)

    def add(self, inputs: Tensor) -> None:
        """One product a block."""
        import torch

        padded = torch.nn.functional.pad(inputs.float(), (0, self.missing))
        parts = padded.reshape(len(inputs), -1, self.size).transpose(0, 1)  # [blocks, tokens, size]
        self.total.baddbmm_(parts.mT, parts)
        self.tokens += len(inputs)

    def mean(self) -> np.ndarray:
        """[blocks, size, size], zeros beyond the last input."""
        return ((self.total + self.total.mT) / (2 * max(self.tokens, 1))).cpu().numpy()


class Sketch:
    """Second moments seen from fixed random directions, [in, rank + 1]."""

    def __init__(self, width: int, rank: int, device: Any) -> None:
        import torch

        source = torch.Generator().manual_seed(width)
        self.tokens, self.rank = 0, rank
        drawn = torch.randn((width, min(rank, width)), generator=source)
        self.directions = torch.linalg.qr(drawn)[0].to(device)
        self.total = torch.zeros_like(self.directions)
        self.diagonal = torch.zeros(width, device=device)

    def add(self, inputs: Tensor) -> None:
        """Two thin products."""
        inputs = inputs.float()
        self.total.addmm_(inputs.T, inputs @ self.directions)
        self.diagonal += inputs.square().sum(dim=0)
        self.tokens += len(inputs)

    def mean(self) -> np.ndarray:
        """Factors of the part of low rank, and in the last column what is left of the diagonal, never negative."""
        import torch

        total = self.total.double() / max(self.tokens, 1)
        directions, diagonal = self.directions.double(), self.diagonal.double() / max(self.tokens, 1)
        inner = directions.T @ total
        values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
        real = values > FLOOR * values[-1:].clamp(min=0)
        factors = total @ (vectors[:, real] / values[real].sqrt())
        made = torch.zeros((len(total), self.rank + 1), dtype=torch.float64, device=total.device)
        made[:, : factors.shape[1]] = factors
        made[:, -1] = (diagonal - factors.square().sum(dim=1)).clamp(min=0)
        return made.float().cpu().numpy()
