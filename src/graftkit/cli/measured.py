"""What methods kept of the orchard's experts' gains, for their pages, by `examples/orchard/measured_methods.py`."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from typing import NamedTuple

FILE = "measured.json"


class Measured(NamedTuple):
    """A row: which experts, what it is called there, the share that it kept with its interval, and the page."""

    experts: str
    row: str
    kept: float
    low: float
    high: float
    page: str


@lru_cache(maxsize=1)
def rows() -> dict[str, tuple[Measured, ...]]:
    """The rows of every method that has any, by method; the best of each set of experts first."""
    held = json.loads(files(__package__).joinpath(FILE).read_text(encoding="utf-8"))
    return {method: tuple(Measured(*row) for row in own) for method, own in held.items()}
