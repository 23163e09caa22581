"""Inputs for the property tests: numbers on a grid, so that ties are frequent and differences are exact in float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

SHAPES = ((), (1,), (5,), (3, 1), (1, 4), (3, 4), (2, 2, 3), (0,))
DENSITIES = (0.0, 0.01, 0.1, 0.29, 0.3, 0.5, 0.57, 0.7, 0.9, 1.0)


@dataclass(frozen=True)
class Case:
    """A base and its models, float64."""

    base: np.ndarray
    models: np.ndarray

    @property
    def count(self):
        return len(self.models)

    @property
    def largest(self):
        return float(np.abs(self.models).max(initial=0) + np.abs(self.base).max(initial=0))


COUNTS, ANY_SHAPE = st.integers(1, 4), st.sampled_from(SHAPES)


@st.composite
def cases(draw, count=COUNTS, shape=ANY_SHAPE):
    """Multiples of 1/64 of small or of up to 14 bits, times a power of two."""
    sizes, models = draw(shape), draw(count)
    bound, scale = draw(st.sampled_from([3, 64, 8192])), 2.0 ** draw(st.integers(-20, 20))
    grid = arrays.arrays(np.int64, (models + 1, *sizes), elements=st.integers(-bound, bound))
    values = draw(grid) / 64 * scale
    return Case(values[0], values[1:])


def eighths(count, low=-16):
    """One value per model, multiples of 1/8: their sums are exact, in any order and in float32."""
    return st.lists(st.integers(low, 16).map(lambda n: n / 8), min_size=count, max_size=count)


def decimals(count):
    """One value per model as people write them, 0.1 to 2."""
    return st.lists(st.integers(1, 20).map(lambda n: n / 10), min_size=count, max_size=count)


def weights(count):
    """Weights of one of the two kinds."""
    return st.one_of(eighths(count), decimals(count))


def densities(count):
    """One density per model, ends included."""
    return st.lists(st.sampled_from(DENSITIES), min_size=count, max_size=count)
