"""Weighted sums of bfloat16 tensors in one compiled pass: rounded once, refused by name, counted as the cast counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from graftkit import merge
from graftkit.checkpoints import storage
from graftkit.errors import NonFiniteError
from graftkit.execution.blending import Blend
from graftkit.execution.blocks import Feed, Workspace
from graftkit.execution.casting import PART, Tally

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


class Rows(Feed):
    """A feed of bits in memory."""

    def __new__(cls, *_: object) -> Rows:
        return object.__new__(cls)

    def __init__(self, label: str, bits: np.ndarray) -> None:
        object.__setattr__(self, "label", label)
        object.__setattr__(self, "bits", bits)

    def raw(self, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        buffer[:] = self.bits[start:stop].view(np.uint8)
        return buffer


def bfloat16(values: torch.Tensor) -> np.ndarray:
    return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def numbers(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def blend(rows: np.ndarray, factors: list[float], anchored: bool = False) -> tuple[np.ndarray, Tally]:
    feeds, tally = tuple(Rows(f"model {k}", row) for k, row in enumerate(rows)), Tally()
    made = Blend(feeds, np.array(factors), anchored, Workspace(), "tensor 'x'")
    return made.block(0, rows.shape[1], tally).view(np.uint16).copy(), tally


def nearest(exact: np.ndarray) -> np.ndarray:
    """The bfloat16 nearest to float64 numbers, found by looking at both neighbours; ties to even."""
    low = exact.astype(np.float32).view(np.uint32) >> 16
    candidates = np.stack([low - (low & 0x7FFF > 0), low, low + 1]).astype(np.uint16)
    with np.errstate(invalid="ignore"):
        gaps = np.abs(numbers(candidates.reshape(-1)).reshape(candidates.shape) - exact)
    ties = np.where(gaps == np.nanmin(gaps, axis=0), candidates.astype(np.int64) % 2, 2)
    return np.take_along_axis(candidates, ties.argmin(axis=0)[None], axis=0)[0]


@PROPERTY
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 7, PART - 1, PART, PART + 1, 3 * PART + 5]), st.booleans())
def test_a_blend_is_the_float64_sum_rounded_once(seed: int, size: int, anchored: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows = np.stack([bfloat16(torch.randn(size, generator=draw)) for _ in range(3)])
    factors = [0.0, 0.6, 0.4] if seed % 2 else [1 - 2.5, 1.75, 0.75]
    got, tally = blend(rows, factors, anchored)
    exact = np.zeros(size)
    for factor, row in zip(factors, rows, strict=True):
        exact += factor * numbers(row)
    assert (numbers(got) == numbers(nearest(exact))).all()
    wanted = exact.astype(np.float32) != numbers(rows[0])
    assert tally.wanted == (wanted.sum() if anchored else 0)
    assert tally.swallowed == ((wanted & (numbers(got) == numbers(rows[0]))).sum() if anchored else 0)
    assert tally.lost == pytest.approx(np.square(numbers(got) - exact).sum(), rel=1e-4)
    assert tally.delta == pytest.approx(np.square(exact - numbers(rows[0])).sum() if anchored else 0, rel=1e-4)


def test_one_model_with_factor_1_is_copied_to_the_bit() -> None:
    row = np.setdiff1d(np.arange(1 << 16), np.flatnonzero(np.arange(1 << 16) & 0x7F80 == 0x7F80)).astype(np.uint16)
    got, _ = blend(row[None], [1.0])
    assert (got == row).all()


@PROPERTY
@given(st.integers(0, 2**32 - 1))
def test_float64_reaches_bfloat16_in_one_rounding(seed: int) -> None:
    """Also beside the middle of two bfloat16, where rounding to float32 first would go the wrong way."""
    draw = np.random.default_rng(seed)
    middles = ((draw.integers(0, 1 << 31, 999).astype(np.uint32) & 0x7FFF0000) | 0x8000).view(np.float32)
    middles = middles[np.abs(middles) < 1e38].astype(np.float64)
    wide = middles * draw.choice([-1.0, 1.0], middles.size) * (1 + draw.choice([-1e-12, 0.0, 1e-12], middles.size))
    raw = storage.narrow(wide, "BF16", np.empty(8 * wide.size, np.uint8))
    assert (raw.view(np.uint16) == nearest(wide)).all()


@pytest.mark.parametrize("place", [0, PART - 1, PART, 2 * PART + 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("model", [0, 1])
def test_a_broken_input_is_named_even_where_its_factor_is_0(
    tmp_path: Path, place: int, value: float, model: int
) -> None:
    models = [torch.ones(3 * PART, dtype=torch.bfloat16) for _ in range(2)]
    models[model][place] = value
    for k, weights in enumerate(models):
        (tmp_path / f"m{k}").mkdir()
        (tmp_path / f"m{k}" / "config.json").write_text("{}")
        save_file({"x.weight": weights}, tmp_path / f"m{k}" / "model.safetensors")
    names = [{"model": str(tmp_path / f"m{k}"), "weight": 1 - 0.5 * k} for k in range(2)]
    with pytest.raises(NonFiniteError, match=f"m{model}.*'x.weight'.*NaN or infinity"):
        merge({"method": "average", "models": names}, tmp_path / "out")


def test_large_numbers_whose_squares_overflow_are_merged(tmp_path: Path) -> None:
    for name, value in (("a", 3e38), ("b", 2e38)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file({"x.weight": torch.full((5,), value, dtype=torch.bfloat16)}, tmp_path / name / "model.safetensors")
    merge({"method": "average", "models": [str(tmp_path / "a"), str(tmp_path / "b")]}, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["x.weight"]
    assert torch.equal(merged, torch.full((5,), 2.5e38, dtype=torch.bfloat16))
