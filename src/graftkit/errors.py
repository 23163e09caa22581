"""Everything that graftkit refuses, as one tree of exceptions.

    GraftError                 a user's error: one sentence that says where, what, and what to do
    ├── RecipeError            the recipe says something that cannot be meant (unknown key, value out of range)
    │   └── PlanError          the recipe does not fit its models (shapes, names, bases, room on disk)
    ├── CheckpointError        weights on disk are missing, truncated, malformed or unsafe
    │   └── NonFiniteError     NaN or infinity in an input
    ├── OutputError            the output cannot be written (it exists, the disk is full)
    │   └── BusyError              another process is writing it
    └── DataError              examples or tasks cannot be read

The command line prints a GraftError as one message and exits with status 2; anything else is a bug of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraftError(Exception):
    """Base of all errors that a user can cause and mend."""


class RecipeError(GraftError):
    """A recipe that cannot be meant: unknown key, wrong type, value out of range."""


class PlanError(RecipeError):
    """A recipe that does not fit its models."""


class CheckpointError(GraftError):
    """Weights on disk that are missing, truncated, malformed or unsafe to read."""


class NonFiniteError(CheckpointError):
    """NaN or infinity in an input tensor."""


class OutputError(GraftError):
    """An output that cannot be written."""


class BusyError(OutputError):
    """An output that another process is writing."""


class DataError(GraftError):
    """Examples or tasks that cannot be read."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name`, or None when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return close[0] if close else None


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """One sentence about an unknown name: what it is, the nearest match or the names that exist.

    `unknown("method", "tiess", ["ties", "dare"])` -> "unknown method 'tiess'; did you mean 'ties'?"
    """
    names = sorted(known)
    close = nearest(name, names)
    if close:
        return f"unknown {what} {name!r}; did you mean {close!r}?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"unknown {what} {name!r}; known: {shown}" if names else f"unknown {what} {name!r}; none exist here"


def missing_extra(extra: str, package: str) -> GraftError:
    """The error for an optional dependency that is not installed."""
    return GraftError(f"this needs {package!r}, which is not installed: pip install 'graftkit[{extra}]'")
