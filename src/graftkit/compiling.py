"""Loops that numba compiles when they are first called, and keeps on disk; importing them does not import numba."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

LOCK = threading.RLock()
"""Held while something is compiled: workers come to their first block together."""

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "forceinline": True}
"""No fast-math where a weight is concerned; and each loop becomes part of the one that calls it."""


class Loop:
    """A function for numba. Other loops may call it."""

    def __init__(self, function: Callable[..., Any], reassociate: bool) -> None:
        self.function = function
        self.options = OPTIONS | ({"fastmath": {"reassoc"}} if reassociate else {})
        self._made: dict[bool, Any] = {}

    def dispatcher(self, cache: bool) -> Any:
        """What numba makes of it, in its cache on disk or not."""
        with LOCK:
            if cache not in self._made:
                from numba import njit

                self._made[cache] = njit(cache=cache, **self.options)(self.function)
            return self._made[cache]

    @property
    def _numba_type_(self) -> Any:
        """How numba knows it where another loop calls it: never from the cache, which would not see it change."""
        return self.dispatcher(cache=False)._numba_type_

    def __call__(self, *arguments: Any) -> Any:
        """Runs it; compiles it before that, for types that it has not met."""
        return (self._made.get(True) or self.dispatcher(cache=True))(*arguments)


def compiled(function: F) -> F:
    """Makes a function on numpy arrays and numbers a compiled loop, which lets other threads run meanwhile."""
    return cast(F, Loop(function, reassociate=False))


def reassociated(function: F) -> F:
    """As `compiled`, where the order of a sum may be the compiler's: for sums of a report, never for a weight."""
    return cast(F, Loop(function, reassociate=True))
