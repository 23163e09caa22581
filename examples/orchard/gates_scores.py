"""Scores of the gates' experiment with resamples of a paired bootstrap over items: the same items for all rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graftkit.measuring.resampling import interval, resampled_sums

RESAMPLES = 10_000
Items = Sequence[Sequence[float]]
Share = np.ndarray
"""A score as measured, then in each resample."""


def drawn(found: Mapping[str, Items], skill: str) -> Share:
    """The metric of a skill."""
    parts = np.asarray(found[skill], np.float64)
    sums = np.concatenate([parts.sum(axis=0)[None], resampled_sums(parts, RESAMPLES, 0, skill)])
    return np.asarray(sums[:, 0] / sums[:, 1])


def gain(held: Mapping[str, Any], name: str, skill: str) -> Share:
    """The share of an expert's gain over the base that a row keeps."""
    rows = held["rows"]
    base, expert, own = (drawn(rows[n]["test"], skill) for n in ("base", f"expert {skill}", name))
    return np.asarray((base - own) / (base - expert))


def kept(held: Mapping[str, Any], name: str) -> Share:
    """The mean of it over the skills."""
    return np.asarray(np.mean([gain(held, name, skill) for skill in held["skills"]], axis=0))


def told(values: Share) -> str:
    """A value with its interval."""
    low, high = interval(values[1:])
    return f"{values[0]:.3f} [{low:.3f}, {high:.3f}]"


def verdict(difference: Share) -> str:
    """Where the interval of a difference lies."""
    low, high = interval(difference[1:])
    return "above" if low > 0 else "below" if high < 0 else "not told apart from"
