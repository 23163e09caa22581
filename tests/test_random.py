"""Keyed random numbers: the published vectors, the compiled twin, and what a user of DARE relies on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from graftkit import methods
from graftkit.methods import kernels
from graftkit.methods.random import Keyed, key_of, philox, philox_uniform
from graftkit.recipes.inputs import keys

KNOWN = [  # Random123 1.14, tests/kat_vectors: counter, key, result of philox4x32 with 10 rounds
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
KEY = 0x299F31D0A4093822
BITS = 2.0**32


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN)
def test_philox_gives_the_published_words(counter, key, wanted):
    words = philox([torch.tensor([word]) for word in counter], key[0] | key[1] << 32)
    assert tuple(int(word) for word in words) == wanted


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN)
def test_the_compiled_rounds_give_the_published_words(counter, key, wanted):
    words, low, high = tuple(np.uint64(word) for word in counter), key[0], key[1]
    for r in range(10):
        bumped = (np.uint64((k + r * step) & 0xFFFFFFFF) for k, step in zip((low, high), kernels.WEYL, strict=True))
        words = tuple(np.uint64(word) for word in kernels._round(*words, *bumped))
    assert tuple(int(word) for word in words) == wanted


def compiled(key, start, count):
    """Uniform numbers as the compiled twin of DARE sees them."""
    first, skip = start // 4, start % 4
    words = np.empty(count + 8, np.uint32)
    kernels.philox_words(np.uint64(key), np.uint64(first), (count + skip + 3) // 4, words)
    return words[skip : skip + count] / BITS


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 7, 8191, 2**34 - 2, 2**34 + 5, 2**40 + 3])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 1001])
def test_the_compiled_twin_gives_the_same_numbers(start, count):
    for key in (0, 1, KEY, 2**64 - 1):
        np.testing.assert_array_equal(compiled(key, start, count), philox_uniform(key, start, count).numpy())


def test_a_block_is_a_part_of_the_whole():
    whole = philox_uniform(KEY, 0, 100)
    for start, stop in [(0, 100), (0, 1), (1, 2), (3, 9), (50, 99), (97, 100), (40, 40)]:
        assert torch.equal(philox_uniform(KEY, start, stop - start), whole[start:stop])


def test_numbers_have_the_shape_of_the_models():
    like = torch.zeros(2, 3, 5)
    numbers = Keyed.of(seed=0, models=2).uniform(like)
    assert numbers.shape == like.shape and numbers.dtype == torch.float64
    assert torch.equal(numbers[1].reshape(-1), philox_uniform(Keyed.of(seed=0, models=2).keys[1], 0, 15))
    assert Keyed.of(seed=0, models=2).uniform(torch.zeros(2)).shape == (2,)
    assert Keyed.of(seed=0, models=2).uniform(torch.zeros(2, 0)).shape == (2, 0)


def test_numbers_are_uniform():
    """Five sigma on mean, variance and 256 bins; the bounds hold with the fixed keys for ever."""
    numbers = torch.cat([philox_uniform(key, 0, 1 << 16) for key in (0, 1, KEY)]).numpy()
    n = numbers.size
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / n)
    assert abs(numbers.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    counts = np.bincount((numbers * 256).astype(int), minlength=256)
    chi_squared = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi_squared - 255) < 5 * math.sqrt(2 * 255)
    bits = (numbers * BITS).astype(np.uint64)
    for place in range(32):
        assert abs(((bits >> np.uint64(place)) & np.uint64(1)).mean() - 1 / 2) < 5 * math.sqrt(1 / 4 / n)


def test_neighbours_and_neighbouring_streams_are_independent():
    n = 1 << 15
    neighbours = (0, 1, 1 << 32, key_of(0, "", 0, "a"), key_of(0, "", 0, "b"))
    streams = [philox_uniform(key, 0, n).numpy() - 0.5 for key in neighbours]
    bound = 5 / 12 / math.sqrt(n)
    for i, one in enumerate(streams):
        for lag in (1, 2, 3, 4, 8):
            assert abs((one[lag:] * one[:-lag]).mean()) < bound * 1.01
        for other in streams[:i]:
            assert abs((one * other).mean()) < bound


def test_keys_differ_by_everything_that_they_are_made_of():
    first = key_of(0, "model", 0, "tensor")
    others = [key_of(1, "model", 0, "tensor"), key_of(0, "other", 0, "tensor"), key_of(0, "model", 1, "tensor")]
    others += [key_of(0, "model", 0, "other"), key_of(0, "model0", 0, "tensor"), key_of(0, "mode", 0, "ltensor")]
    assert len({first, *others}) == 7
    assert 0 <= first < 2**64


def test_keys_are_for_ever():
    """A recipe that was merged once can be merged again: changing this is a change of results."""
    assert key_of(0, "", 0, "") == 18276452918330109229
    assert philox_uniform(key_of(7, "abc", 1, "x.weight"), 5, 2).tolist() == [0.615703437011689, 0.37878530635498464]


def test_a_model_listed_twice_has_two_streams_and_order_does_not_matter():
    class Source:
        def __init__(self, content):
            self.content = content

    class Recipe:
        seed = 3

    sources = (Source("a"), Source("b"))
    first = keys(Recipe, sources, (0, 1, 0), "w")
    assert len(set(first)) == 3
    assert keys(Recipe, sources, (1, 0, 0), "w") == (first[1], first[0], first[2])
    assert not set(first) & set(keys(Recipe, sources, (0, 1, 0), "other"))


@pytest.mark.parametrize("elect", ["none", "sign"])
def test_dare_gives_the_delta_on_average(elect):
    """The mean over seeds tends to the delta, entry by entry, within five sigma."""
    density, seeds = 0.3, 600
    deltas = torch.randn(1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    function, whole = methods.get("dare").function, torch.ones(1)
    drawn = [function(deltas, Keyed.of(seed=s, models=1), whole, density=density, elect=elect) for s in range(seeds)]
    sigma = deltas[0].abs() * math.sqrt((1 - density) / density / seeds)
    assert bool(((torch.stack(drawn).mean(dim=0) - deltas[0]).abs() < 5 * sigma).all())


def test_dare_keeps_its_share_and_nothing_else():
    density = 0.1
    deltas = torch.randn(3, 100, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    masks = torch.stack(
        [
            methods.get("dare").function(deltas[k : k + 1], Keyed((key,)), torch.ones(1), density=density) != 0
            for k, key in enumerate(Keyed.of(seed=0, models=3).keys)
        ]
    )
    sigma = math.sqrt(density * (1 - density) / 10_000)
    assert bool(((masks.double().mean(dim=(1, 2)) - density).abs() < 5 * sigma).all())
    both = float((masks[0] & masks[1]).double().mean())
    assert abs(both - density**2) < 5 * math.sqrt(density**2 * (1 - density**2) / 10_000)
