"""Graft's compatibility in numbers: equations 9 to 14 of arXiv 2506.23940 from what was measured of each sample.

With A the activations of module i on sample k, all entries over its tokens and channels:

    magnitude     mu_i  = mean_k mean |A|                              (9)
    sparsity      s_i   = mean_k share of entries with |A| < eps_i     (10)
    variance      v_i   = mean_k Var(A), of the entries, divided by their number     (11)
    sensitivity   rho_i = mu_i (1 - s_i) sqrt(v_i)                     (12)
    normalised    the same of mu, s and v, each scaled to [0, 1] by its least and greatest over the modules    (13)
    score         mean_i rho_i; raw from (12), normalised from (13)    (14)

Where all modules have one value (one module, say), (13) is 0 / 0: each gets 1/2. Samples count alike, however long.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graftkit.measuring.resampling import interval, resampled_sums
from graftkit.measuring.table import Value

Array = NDArray[np.float64]

ALIKE = 1e-9  # of the greatest: modules whose values lie closer than this do not differ
LEAST = 10  # samples below which resampling says too little about others for an interval
MIDDLE = 0.5  # what each of such modules gets
_AT_ONCE = 500  # resamples whose modules are held in memory


@dataclass(frozen=True)
class Spread:
    """The normalised score over sets of so many samples: its mean and 95% interval."""

    samples: int
    normalised: Value


def normalised_parts(parts: Array) -> Array:
    """Equation 13's `mu', s', v'` of [..., modules, 3]."""
    low, high = parts.min(axis=-2, keepdims=True), parts.max(axis=-2, keepdims=True)
    span = high - low
    alike = span <= ALIKE * np.maximum(np.abs(low), np.abs(high))
    return np.where(alike, MIDDLE, (parts - low) / np.where(alike, 1.0, span))  # type: ignore[no-any-return]


def sensitivities(parts: Array) -> Array:
    """Equation 12 of [..., modules, 3], the columns being mu, s, v: [..., modules]."""
    return parts[..., 0] * (1 - parts[..., 1]) * np.sqrt(parts[..., 2])  # type: ignore[no-any-return]


def scores(parts: Array) -> tuple[Array, Array]:
    """Equation 14, raw and normalised, of [..., modules, 3]."""
    return sensitivities(parts).mean(axis=-1), sensitivities(normalised_parts(parts)).mean(axis=-1)


def resampled(samples: Array, resamples: int, seed: int, key: str) -> tuple[Array, Array]:
    """Raw and normalised scores of `resamples` draws of samples [samples, modules, 3] with replacement.

    The draws depend on seed, key and the number of samples, so models on the same data see the same ones.
    """
    count, modules, _ = samples.shape
    found = [np.empty(0), np.empty(0)]
    for number in range(0, resamples, _AT_ONCE):
        some = min(_AT_ONCE, resamples - number)
        sums = resampled_sums(samples.reshape(count, -1), some, seed, f"{key}/{number}")
        drawn = scores(sums.reshape(some, modules, 3) / count)
        found = [np.concatenate(two) for two in zip(found, drawn, strict=True)]
    return found[0], found[1]


def with_interval(value: float, drawn: Array, count: int) -> Value:
    """A value with the interval of its resamples; none where there are not two, or fewer than 10 samples."""
    return Value(float(value), *interval(drawn)) if len(drawn) > 1 and count >= LEAST else Value(float(value))


def by_samples(samples: Array, resamples: int, seed: int) -> tuple[Spread, ...]:
    """How the normalised score depends on the number of samples: 1, 2, 4, ... of those at hand, and all.

    Each size is drawn `resamples` times with replacement from all samples, so its spread is that of other samples of
    this kind as far as those at hand show it: from fewer than 10 there are no intervals.
    """
    count = len(samples)
    sizes = sorted({*(2**k for k in range(count.bit_length()) if 2**k <= count), count})
    generator = np.random.default_rng([seed, count])
    made = []
    for size in sizes if resamples > 1 else ():
        counts = generator.multinomial(size, np.full(count, 1 / count), size=resamples)  # [resamples, samples]
        parts = np.split(counts, range(_AT_ONCE, resamples, _AT_ONCE))
        drawn = np.concatenate([scores(np.tensordot(part, samples, axes=1) / size)[1] for part in parts])
        made.append(Spread(size, with_interval(float(drawn.mean()), drawn, count)))
    return tuple(made)
