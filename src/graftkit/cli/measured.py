"""What methods kept of the orchard's experts' gains: made by `examples/orchard/measured_methods.py`."""

from typing import NamedTuple


class Measured(NamedTuple):
    """A row: which experts, what it is called there, the share that it kept with its interval, and the page."""

    experts: str
    row: str
    kept: float
    low: float
    high: float
    page: str


ROWS: dict[str, tuple[Measured, ...]] = {}
