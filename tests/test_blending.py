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
from graftkit.execution.blending import BLEND, VOTED, Fused, reaching, vote
from graftkit.execution.blocks import Feed, Workspace
from graftkit.execution.casting import PART, Tally
from graftkit.methods.ballots import Ballot
from graftkit.methods.random import philox_uniform

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


class Shifted(Rows):
    """The same, as if they began at a later place of a tensor."""

    def __init__(self, label: str, bits: np.ndarray, first: int) -> None:
        super().__init__(label, bits)
        object.__setattr__(self, "first", first)

    def raw(self, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        return super().raw(start - self.first, stop - self.first, buffer)


def bfloat16(values: torch.Tensor) -> np.ndarray:
    return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def numbers(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def blend(rows: np.ndarray, factors: list[float], anchored: bool = False) -> tuple[np.ndarray, Tally]:
    feeds, tally = tuple(Rows(f"model {k}", row) for k, row in enumerate(rows)), Tally()
    made = Fused(feeds, BLEND, np.array(factors), np.array([anchored], np.int64), Workspace(), "tensor 'x'")
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
@pytest.mark.parametrize(
    ("method", "model"), [("average", 0), ("average", 1), ("ties", 0), ("ties", 1), ("dare", 1), ("dare", 2)]
)
def test_a_broken_input_is_named_even_where_it_does_not_count(
    tmp_path: Path, place: int, value: float, method: str, model: int
) -> None:
    models = [torch.ones(3 * PART, dtype=torch.bfloat16) for _ in range(3)]
    models[model][place] = value
    for k, weights in enumerate(models):
        (tmp_path / f"m{k}").mkdir()
        (tmp_path / f"m{k}" / "config.json").write_text("{}")
        save_file({"x.weight": weights}, tmp_path / f"m{k}" / "model.safetensors")
    names = [{"model": str(tmp_path / f"m{k}"), "weight": 1 - 0.4 * k} for k in range(3)]
    recipe = {"method": method, "models": names}
    if method != "average":
        recipe |= {"base": names.pop(0)["model"], "knobs": {"density": 0.1}}
    with pytest.raises(NonFiniteError, match=f"m{model}.*'x.weight'.*NaN or infinity"):
        merge(recipe, tmp_path / "out")


def test_large_numbers_whose_squares_overflow_are_merged(tmp_path: Path) -> None:
    for name, value in (("a", 3e38), ("b", 2e38)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file({"x.weight": torch.full((5,), value, dtype=torch.bfloat16)}, tmp_path / name / "model.safetensors")
    merge({"method": "average", "models": [str(tmp_path / "a"), str(tmp_path / "b")]}, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["x.weight"]
    assert torch.equal(merged, torch.full((5,), 2.5e38, dtype=torch.bfloat16))


def voted(rows: np.ndarray, ballot: Ballot, keys: tuple[int, ...], start: int) -> np.ndarray:
    """The float64 reference of a vote, in numpy: weights [n]."""
    base, deltas = numbers(rows[0]), np.stack([numbers(row) - numbers(rows[0]) for row in rows[1:]])
    kept = np.abs(deltas).astype(np.float32) >= ballot.limits.astype(np.float32)[:, None]
    for row, key, share in zip(kept, keys, ballot.shares, strict=True):
        row &= philox_uniform(key, start, row.size).numpy() < share
    deltas = ballot.gains[:, None] * np.where(kept, deltas, 0)
    if ballot.votes is None:
        return base + ballot.scale * (ballot.weights[:, None] * deltas).sum(0)
    sign = np.where((ballot.votes[:, None] * deltas).sum(0) >= 0, 1, -1)
    agrees = np.sign(deltas) * np.where(ballot.votes >= 0, 1, -1)[:, None] == sign
    merged, share = ((ballot.weights[:, None] * agrees * x).sum(0) for x in (deltas, 1))
    return base + ballot.scale * merged / (np.where(share == 0, 1, share) if ballot.mean else 1)


@PROPERTY
@given(st.data(), st.integers(0, 2**32 - 1), st.sampled_from([1, 7, VOTED - 1, VOTED + 1, 3 * VOTED + 5]))
def test_a_vote_is_the_float64_result_rounded_once(data: st.DataObject, seed: int, size: int) -> None:
    draw, models = torch.Generator().manual_seed(seed), data.draw(st.integers(1, 4))
    base = torch.randn(size, generator=draw)
    near = [base + 0.1 * torch.randn(size, generator=draw) for _ in range(models)]
    rows = np.stack([bfloat16(row) for row in (base, *near)])

    def each(values: st.SearchStrategy[float]) -> np.ndarray:
        return np.array(data.draw(st.lists(values, min_size=models, max_size=models)))

    ballot = Ballot(
        limits=each(st.sampled_from([0.0, 0.03125, 0.1, np.inf])),
        shares=each(st.sampled_from([0.0, 2.0**-33, 0.3, 0.5, 1.0])),
        gains=each(st.sampled_from([1.0, 2.0, 1 / 0.3])),
        votes=each(st.sampled_from([1.0, 0.5, -0.25])) if data.draw(st.booleans()) else None,
        weights=each(st.sampled_from([0.0, 0.4, 1.0, 1.5])),
        mean=data.draw(st.booleans()),
        scale=data.draw(st.sampled_from([0.0, 0.7, 1.0])),
    )
    keys, start = tuple(seed + k for k in range(models)), data.draw(st.sampled_from([0, 3, 2**34 + 1]))
    feeds = tuple(Shifted(f"model {k}", row, start) for k, row in enumerate(rows))
    made = vote(feeds, ballot, keys, Workspace(), "tensor 'x'").block(start, start + size, Tally())
    want = voted(rows, ballot, keys, start)
    assert (numbers(made.view(np.uint16)) == numbers(nearest(want))).all()


@PROPERTY
@given(st.floats(0, 2.0**127, width=32))
def test_float64_above_a_float32_limit_are_told_apart_as_float32(limit: float) -> None:
    least = reaching(np.array([limit]))[0]
    assert np.float32(least) >= limit
    assert limit == 0 or np.float32(np.nextafter(least, 0)) < limit
