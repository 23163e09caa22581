"""Passes over tiles make the numbers that the methods' twins make of whole blocks, to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from graftkit.checkpoints import storage
from graftkit.execution.casting import round_bfloat16
from graftkit.execution.direct import NO_MARKS
from graftkit.execution.tiles import ALL, MOST, ROWS, STRIP, Rule, bits_of, mark_rows, marks_for, merge_rows, weighted
from graftkit.methods import kernels
from graftkit.methods.random import Keyed

SHAPES = [(1, 1), (3, 63), (4, 64), (7, 130), (8, STRIP), (5, STRIP + 1), (2, 2 * STRIP + 70)]
RANKS = [(-1, 4), (4, -1), (3, 8), (0, 5), (-1, -1), (2, -1, 4), (1,) * 18, (-1, *[2] * 9)]
KINDS = [
    (dtype, mean, short) for dtype in (np.float64, np.float32) for mean in (True, False) for short in (False, True)
]
"""Every kind of inputs compiles loops of its own, so that not each meets each."""


class Case:
    """Random inputs, and their deltas as blocks have them, [models, n]."""

    def __init__(self, shape, ranks, dtype=np.float64, delta=True):
        rows, columns = shape
        rng, total = np.random.default_rng(len(ranks) * 1000 + rows), sum(max(rank, 0) for rank in ranks)
        self.ranks, self.delta, self.dtype = np.array(ranks), delta, np.dtype(dtype)
        self.left, self.right = (
            rng.normal(size=(rows, total)).astype(dtype),
            rng.normal(size=(total, columns)).astype(dtype),
        )
        self.base = rng.normal(size=rows * columns).astype(np.float32)
        self.base[::7] *= 0
        self.base[::14] *= -1  # zeros of both signs
        self.stack = rng.normal(size=(ranks.count(-1), rows * columns)).astype(np.float32)
        self.stack[:, ::3] = self.base[::3]
        self.out = np.empty(rows * columns, np.float32)
        self.values = np.stack(list(self._values()))

    def _values(self):
        r = plain = 0
        for rank in self.ranks:
            if rank < 0:
                whole = self.stack[plain].astype(self.dtype)
                yield whole - self.base if self.delta else whole
                plain += 1
            else:
                product = np.zeros((self.left.shape[0], self.right.shape[1]), self.dtype)
                storage.add_products(self.left[:, r : r + rank].copy(), self.right[r : r + rank].copy(), product)
                yield product.reshape(-1) if self.delta else self.base.astype(self.dtype) + product.reshape(-1)
                r += rank

    def merged(self, rule, start=0, short=False):
        count, columns = len(self.ranks), self.right.shape[1]
        near = np.full((count * ROWS, STRIP), np.nan, self.dtype)
        inputs, marks, bits = (
            (self.left, self.right, self.ranks, self.base, tuple(self.stack) or (self.base,)),
            NO_MARKS,
            bits_of(count),
        )
        if not rule.plain:
            marks = marks_for(self.left.shape[0], columns, count)
            mark_rows(*inputs, self.delta, near, start, columns, bits, marks, *rule.selection)
        headed = (self.delta and self.ranks[0] < 0 and count <= MOST) or None
        near[:] = np.nan
        settings = near, headed, bits, marks, *rule.combination, short or None
        assert merge_rows(*inputs, self.delta or None, *settings, self.out)
        return self.out

    def settled(self, result):
        """A method's result on the base, as float32."""
        return (result + self.base.astype(self.dtype) if self.delta else result).astype(np.float32)

    def rule(self, limits=0, shares=None, keys=(), gain=1, votes=(), weights=(), mean=False, scale=1.0):
        count = len(self.ranks)
        cuts = np.array(
            [ALL if share == 1 else int(np.ceil(share * 2**32)) for share in shares or [1] * count], np.uint64
        )
        streams = np.array(keys or [0] * count, np.uint64)
        made = [np.full(count, limits, np.float32), cuts, streams, np.full(count, gain, self.dtype)]
        return Rule(*made, np.array(votes, self.dtype), np.array(weights, self.dtype), mean, scale)

    def weights(self):
        return np.array([0.3, -0.7, 1.1, 0.25, 0.6, 2.0, -0.1, 0.9] * 3)[: len(self.ranks)]


def same(mine, theirs):
    assert np.array_equal(mine.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("ranks", "delta"), [*((ranks, True) for ranks in RANKS), *((ranks, False) for ranks in RANKS[::4])]
)
def test_sums(shape, ranks, delta):
    case = Case(shape, ranks, delta=delta)
    out = np.empty(case.out.size)
    kernels.weighted_sum(case.values, case.weights(), out)
    same(case.merged(weighted(case.weights())), case.settled(out))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("ranks", "kind"), [(ranks, KINDS[k % len(KINDS)]) for k, ranks in enumerate(RANKS)])
def test_elections(shape, ranks, kind):
    dtype, mean, short = kind
    case = Case(shape, ranks, dtype)
    for votes in (np.ones(len(ranks)), case.weights()):
        limits, scale = np.full(len(ranks), 0.8), dtype(0.7)
        out, weights = np.empty(case.out.size, dtype), case.weights().astype(dtype)
        kernels._elect(case.values.copy(), limits.astype(np.float32), weights, votes.astype(dtype), mean, scale, out)
        got = case.merged(case.rule(0.8, votes=votes, weights=weights, mean=mean, scale=0.7), short=short)
        wanted = case.settled(out)
        if short:
            bits = np.empty(wanted.size, np.uint16)
            round_bfloat16(out + case.base.astype(dtype), wanted, bits)
            storage.widen_bfloat16(bits, wanted)
        same(got, wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("ranks", "elect"), [(ranks, ("none", "sign")[k % 2]) for k, ranks in enumerate(RANKS)])
@pytest.mark.parametrize(("start", "densities"), [(0, [0.4]), (4, [1.0, 0.4, 0.0]), (9, [0.3, 0.7])])
def test_draws(shape, ranks, start, densities, elect):
    case = Case(shape, ranks)
    keys, weights, shares = tuple(range(5, 5 + len(ranks))), case.weights(), (densities * len(ranks))[: len(ranks)]
    out, votes = np.empty(case.out.size), np.ones(len(ranks)) if elect == "sign" else ()
    told = {"density": shares, "weight": weights.tolist(), "scale": 1.0, "elect": elect, "normalize": False}
    told |= {"combine": "mean", "weighted_election": False, "rescale": True, "rescale_by": "chance"}
    kernels.dare(case.values.copy(), Keyed(keys, start), np.ones(len(ranks)), **told, out=out)
    gains, mean = [1 / share if share else 1 for share in shares], elect == "sign"
    rule = case.rule(shares=shares, keys=keys, gain=gains, votes=votes, weights=weights, mean=mean)
    same(case.merged(rule, start), case.settled(out))


def test_what_is_not_finite_is_told():
    case = Case((4, 64), (-1, 4))
    for place, value in ((case.stack, np.nan), (case.stack, np.inf), (case.base, np.nan)):
        kept = place.reshape(-1)[70]
        place.reshape(-1)[70] = value
        for rule in (weighted(np.ones(2)), case.rule(0.5, votes=np.ones(2), weights=np.ones(2), mean=True)):
            with pytest.raises(AssertionError):
                case.merged(rule)
        place.reshape(-1)[70] = kept
    case.merged(weighted(np.ones(2)))
