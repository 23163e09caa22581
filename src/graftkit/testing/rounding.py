"""Comparing results in units of an output's last place, which is all that a caller of a merge can see."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = {"float32": (24, -149), "bfloat16": (8, -133), "float16": (11, -24)}
"""Bits of the significand, and the exponent of the smallest number, of the dtypes of an output."""

CANCELLED = 2.0**-8
"""Results smaller than this share of their inputs are compared at that share: what cancels has fewer good digits."""


def rounded(values: Tensor, dtype: str) -> np.ndarray:
    """The values after the cast to an output's dtype, as float64."""
    import torch

    return values.to(getattr(torch, dtype)).to(torch.float64).cpu().numpy()


def unit(values: np.ndarray, dtype: str) -> np.ndarray:
    """The unit of the last place of a dtype at each value, as float64; infinite values count as the largest number."""
    bits, lowest = FORMATS[dtype]
    largest = np.where(np.isfinite(values), np.abs(values), np.finfo(np.float32).max)
    exponent = np.frexp(largest.astype(np.float64))[1]
    return np.ldexp(1.0, np.maximum(exponent - bits, lowest))


def beyond_one_unit(got: np.ndarray, want: np.ndarray, dtype: str, inputs: np.ndarray) -> np.ndarray:
    """Where two rounded results lie more than one unit of `dtype` apart. `inputs`: the largest input of each entry."""
    with np.errstate(invalid="ignore"):
        gap = np.abs(got - want)
    size = np.maximum(np.maximum(np.abs(got), np.abs(want)), inputs * CANCELLED)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    return ~same & ~(gap <= unit(size, dtype))
