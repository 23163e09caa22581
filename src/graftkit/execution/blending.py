"""Merges of bfloat16 tensors from the files' bytes to the output's in one compiled pass.

Most merges are a weighted sum: of the models, or of the base and its models where the method's factors are for deltas.
Most others thin the deltas out, elect a sign and combine what agrees. A part of a block goes through all of it while it
is in the nearest cache, in float64, and is rounded once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from graftkit.checkpoints import storage
from graftkit.compiling import compiled
from graftkit.execution.blocks import Feed, Reader, Workspace, non_finite
from graftkit.execution.casting import PART, Tally, check, round_bfloat16, tally_part
from graftkit.execution.machine_code import Pass
from graftkit.methods import Method
from graftkit.methods.ballots import Ballot
from graftkit.methods.kernels import keep_below, philox_words

VOTED = 512  # elements that are voted on together: those of a few models fit in the nearest cache
HEAD = 3  # numbers of a ballot that are not the models'
ALL = 1 << 32  # random words


@dataclass(frozen=True)
class Fused:
    """One step as a pass over the bits of its `feeds`, the base the first of them if there is one.

    `numbers` and `words` are the pass's own; the first of the words is the place of the block.
    """

    feeds: tuple[Feed, ...]
    run: Pass
    numbers: np.ndarray
    words: np.ndarray
    space: Workspace
    label: str

    def block(self, start: int, stop: int, tally: Tally) -> np.ndarray:
        """The bytes of elements `[start, stop)`. Raises NonFiniteError for a broken input or result."""
        raws = read_bits(self.feeds, start, stop, self.space)
        out, sums = self.space.take("fused", stop - start, np.uint16), np.zeros(4)
        words = np.concatenate([[start], self.words])
        self.run(raws, self.numbers, words, out, sums, *scratch(self.space, len(self.feeds)))
        if not np.isfinite(sums).all():
            check_bits(self.feeds, raws)
        check(out.view(np.uint8), "BF16", sums, self.label)
        tally.add(sums)
        return out.view(np.uint8)


def read_bits(feeds: tuple[Feed, ...], start: int, stop: int, space: Workspace) -> np.ndarray:
    """Elements `[start, stop)` of bfloat16 tensors, as bits [feeds, n], unchecked."""
    raws = space.stack("raws", len(feeds), stop - start, np.uint16)
    for feed, row in zip(feeds, raws, strict=True):
        feed.raw(start, stop, row.view(np.uint8))
    return raws


def check_bits(feeds: tuple[Feed, ...], raws: np.ndarray) -> None:
    """Refuses NaN and infinity by model and tensor."""
    for feed, row in zip(feeds, raws, strict=True):
        if not storage.finite(row.view(np.uint8), "BF16"):
            assert feed.info is not None
            raise non_finite(feed.label, feed.info)


def scratch(space: Workspace, feeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Room for a pass's intermediate numbers."""
    return space.take("wide", (3 + feeds) * PART, np.float64), space.take("single", 5 * PART, np.float32)


def bits_of(reader: Reader) -> tuple[Feed, ...] | None:
    """The inputs of a step, the base first, if all are bfloat16 tensors on disk and nothing is prepared; else None."""
    feeds = (*([reader.base] if reader.base else []), *reader.models)
    plain = not reader.prepared and all(feed.info is not None and feed.info.dtype == "BF16" for feed in feeds)
    return feeds if plain else None


def fused_of(method: Method, given: dict[str, object], reader: Reader) -> Fused | None:
    """The step of a reader as one pass, by the factors or the ballot in `given`; None where it is more than that."""
    step, feeds = reader.step, bits_of(reader)
    anchored = method.returns_delta and reader.base is not None
    if feeds is None or step.prepare or step.finish or step.dtype != "BF16":
        return None
    factors, ballot, label = given.get("factors"), given.get("ballot"), f"tensor {step.name!r}"
    if isinstance(factors, np.ndarray):
        chosen = feeds if anchored else reader.models
        return blend(chosen, factors, anchored, reader.space, label)
    if isinstance(ballot, Ballot) and anchored:
        return vote(feeds, ballot, step.keys, reader.space, label)
    return None


def blend(feeds: tuple[Feed, ...], factors: np.ndarray, anchored: bool, space: Workspace, label: str) -> Fused:
    """A weighted sum of the feeds; `anchored` where the first is the base and the factors are for the deltas."""
    if anchored:
        factors = np.concatenate([[1 - factors.sum()], factors])
    return Fused(feeds, BLEND, factors, np.array([anchored], np.int64), space, label)


def vote(feeds: tuple[Feed, ...], ballot: Ballot, keys: tuple[int, ...], space: Workspace, label: str) -> Fused:
    """A ballot on the deltas of the feeds, of which the first is the base; `keys` those of random numbers, if any."""
    some = ballot.shares > 0
    votes = np.zeros_like(ballot.weights) if ballot.votes is None else ballot.votes
    head = [ballot.scale, ballot.mean, ballot.votes is not None]
    limits = np.where(some, reaching(ballot.limits), np.inf)  # a share of nothing
    numbers = np.concatenate([head, ballot.weights, votes, limits, ballot.gains]).astype(np.float64)
    cuts = [math.ceil(share * ALL) if share > 0 else ALL for share in ballot.shares.tolist()]
    streams = np.array(keys or [0] * len(cuts), np.uint64).view(np.int64)
    return Fused(feeds, VOTE, numbers, np.concatenate([streams, np.array(cuts, np.int64)]), space, label)


def reaching(limits: np.ndarray) -> np.ndarray:
    """The smallest float64 that, as float32, are at or above float32 limits: thresholds are told apart in float32."""
    single = limits.astype(np.float32)
    with np.errstate(invalid="ignore"):
        middles = (np.nextafter(single, np.float32(-np.inf)).astype(np.float64) + single) / 2
    even = single.view(np.uint32) % 2 == 0  # to which a middle is rounded
    found = np.where(even, middles, np.nextafter(middles, np.inf))
    return np.where(np.isfinite(single) & (single > 0), found, single)  # type: ignore[no-any-return]


@compiled
def _blend(raws, factors, words, out, sums, wide, single):  # type: ignore[no-untyped-def]
    near, before, after = single[:PART], single[PART : 2 * PART], single[2 * PART : 3 * PART]
    for first in range(0, out.size, PART):
        bits = out[first : first + PART]
        n = bits.size
        for i in range(n):
            wide[i] = -0.0  # the only number that every other is unchanged by: -0.0 stays -0.0
        for t in range(raws.shape[0]):
            _add(raws[t, first : first + n], factors[t], wide[:n])  # a slice of all rows would not be contiguous
        storage.widen_bfloat16(raws[0, first : first + n], before[:n])
        _finish(wide[:n], before[:n], words[1] != 0, near[:n], after[:n], bits, sums)


@compiled
def _finish(wide, before, anchored, near, after, bits, sums):  # type: ignore[no-untyped-def]
    round_bfloat16(wide, near, bits)
    storage.widen_bfloat16(bits, after)
    tally_part(near, before, after, anchored, sums)


@compiled
def _add(bits, factor, total):  # type: ignore[no-untyped-def]
    for i in range(total.size):
        total[i] += factor * np.float64(np.uint32(np.uint32(bits[i]) << np.uint32(16)).view(np.float32))


@compiled
def _vote(raws, numbers, words, out, sums, wide, single):  # type: ignore[no-untyped-def]
    models, elected = raws.shape[0] - 1, numbers[2] != 0
    weights = numbers[HEAD : HEAD + models]
    votes = numbers[HEAD + models : HEAD + 2 * models] if elected else weights
    for first in range(0, out.size, VOTED):
        bits = out[first : first + VOTED]
        n = bits.size
        near, before, after = single[:n], single[VOTED : VOTED + n], single[2 * VOTED : 2 * VOTED + n]
        merged, total, share = wide[:n], wide[VOTED : VOTED + n], wide[2 * VOTED : 2 * VOTED + n]
        storage.widen_bfloat16(raws[0, first : first + n], before)
        for t in range(models):
            delta = wide[(3 + t) * VOTED : (3 + t) * VOTED + n]
            limit, gain = numbers[HEAD + 2 * models + t], numbers[HEAD + 3 * models + t]
            if words[1 + models + t] < ALL:
                _thin(raws[t + 1, first : first + n], before, limit, gain, delta)
                _draw(delta, first, t, words, single[3 * VOTED :].view(np.uint32))
                _add_weighted(delta, votes[t], t == 0, total)
            else:
                _thin_and_add(raws[t + 1, first : first + n], before, limit, gain, delta, votes[t], t == 0, total)
        if elected:
            for t in range(models):
                delta = wide[(3 + t) * VOTED : (3 + t) * VOTED + n]
                _add_agreeing(delta, total, 1.0 if votes[t] >= 0 else -1.0, weights[t], t == 0, merged, share)
            _share_out(merged, share, numbers[1] != 0, total)
        for i in range(n):
            total[i] = np.float64(before[i]) + numbers[0] * total[i]
        _finish(total, before, True, near, after, bits, sums)


@compiled
def _thinned(bits, base, limit, gain):  # type: ignore[no-untyped-def]
    """A delta, or 0 where it is small; NaN stays, to be refused."""
    kept = np.float64(np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)) - np.float64(base)
    return 0.0 if abs(kept) < limit else gain * kept


@compiled
def _thin(bits, base, limit, gain, delta):  # type: ignore[no-untyped-def]
    for i in range(delta.size):
        delta[i] = _thinned(bits[i], base[i], limit, gain)


@compiled
def _thin_and_add(bits, base, limit, gain, delta, weight, fresh, total):  # type: ignore[no-untyped-def]
    for i in range(delta.size):
        delta[i] = _thinned(bits[i], base[i], limit, gain)
        total[i] = (0.0 if fresh else total[i]) + weight * delta[i]


@compiled
def _add_weighted(delta, weight, fresh, total):  # type: ignore[no-untyped-def]
    for i in range(total.size):
        total[i] = (0.0 if fresh else total[i]) + weight * delta[i]


@compiled
def _draw(delta, first, t, words, random):  # type: ignore[no-untyped-def]
    """Leaves of a delta what its random words say."""
    models = (words.size - 1) // 2
    start, cut = np.uint64(words[0] + first), np.uint64(words[1 + models + t])
    skip = np.int64(start % np.uint64(4))
    philox_words(np.uint64(words[1 + t]), start // np.uint64(4), (delta.size + skip + 3) // 4, random)
    keep_below(delta, random[skip : skip + delta.size], cut, 1.0)


@compiled
def _add_agreeing(delta, total, side, weight, fresh, merged, share):  # type: ignore[no-untyped-def]
    for i in range(merged.size):
        sign = side if total[i] >= 0 else -side
        factor = weight if delta[i] * sign > 0 else 0.0  # a choice, not a branch: it vectorises
        merged[i] = (0.0 if fresh else merged[i]) + factor * delta[i]
        share[i] = (0.0 if fresh else share[i]) + factor


@compiled
def _share_out(merged, share, mean, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        out[i] = merged[i] / (share[i] if share[i] != 0.0 else 1.0) if mean else merged[i]


BLEND, VOTE = Pass(_blend), Pass(_vote)
