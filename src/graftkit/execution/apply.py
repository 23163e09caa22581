"""Running one method on one block: its compiled twin where it has one, else its torch function; and the final cast."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit

from graftkit.checkpoints import storage
from graftkit.errors import GraftError, NonFiniteError, RecipeError
from graftkit.execution.blocks import Workspace
from graftkit.methods import Method

PART = 4096  # elements that the tally adds up in float32 before it goes on in float64


@lru_cache
def kernel_of(name: str) -> Callable[..., None]:
    """The compiled twin named `module:function`."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def apply(
    method: Method,
    given: Mapping[str, Any],
    knobs: Mapping[str, Any],
    shape: tuple[int, ...],
    device: str,
    space: Workspace,
) -> np.ndarray:
    """The method's result for a block, flat [n].

    `given` holds flat blocks; a torch function sees them as [models, *shape], with `shape` the block's.
    """
    arguments = [given[name] for name in method.reads]
    if method.kernel and device == "cpu":
        stack = given.get("deltas", given.get("models"))
        assert stack is not None
        out = space.take("result", stack.shape[1], stack.dtype)
        kernel = kernel_of(method.kernel)
        _refusing(method, lambda: kernel(*arguments, **knobs, out=out))
        return out
    import torch

    torch.set_num_threads(1)

    def tensor(name: str, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        moved = torch.from_numpy(value).to(device)
        return (
            moved.reshape(len(value), *shape)
            if name in ("models", "deltas")
            else moved.reshape(shape)
            if name == "base"
            else moved
        )

    with torch.inference_mode():
        values = [tensor(n, v) for n, v in zip(method.reads, arguments, strict=True)]
        result = _refusing(method, lambda: method.function(*values, **knobs))
    stack = next(given[name] for name in ("deltas", "models", "base") if given.get(name) is not None)
    if result.numel() != stack.shape[-1]:
        raise GraftError(
            f"method {method.name!r} returned {result.numel()} elements for {stack.shape[-1]}; a method keeps the shape"
        )
    return np.ascontiguousarray(result.reshape(-1).cpu().numpy(), stack.dtype)


def _refusing(method: Method, run: Callable[[], Any]) -> Any:
    """A method says by ValueError that it cannot do what its knobs ask."""
    try:
        return run()
    except ValueError as error:
        raise RecipeError(f"{method.name}: {error}") from error


@dataclass
class Tally:
    """What a merge did to one tensor, and what the cast swallowed of it.

    `delta` and `lost` are sums of squares of the wanted change and of the cast's error; `swallowed` counts weights
    that should have changed and did not. Without a base only the cast's error counts.
    """

    delta: float = 0.0
    lost: float = 0.0
    swallowed: int = 0
    wanted: int = 0

    def record(self, elements: int) -> dict[str, float]:
        """For the journal and `graft.json`."""
        return {
            "delta_norm": float(np.sqrt(self.delta)),
            "cast_error_norm": float(np.sqrt(self.lost)),
            "unchanged": self.swallowed / self.wanted if self.wanted else 0.0,
            "changed": (self.wanted - self.swallowed) / elements if elements else 0.0,
        }


def cast(
    result: np.ndarray, base: np.ndarray | None, is_delta: bool, dtype: str, tally: Tally, space: Workspace, label: str
) -> np.ndarray:
    """Adds the base to a delta and casts once; returns the bytes to write.

    Raises NonFiniteError when the result overflows the output dtype or is undefined (weights that sum to zero).
    """
    if dtype == "BF16" and result.dtype == np.float32:
        raw = space.take("out", result.size * 8, np.uint8)[: result.size * 2]
        good, sums = _cast_bfloat16(result, result if base is None else base, is_delta, raw.view(np.uint16))
    else:
        raw, good, sums = _cast_any(result, base, is_delta, dtype, space)
    if not good:
        raise NonFiniteError(
            f"{label}: the result is not finite in {dtype}: weights that sum to zero, or too large for it"
        )
    tally.delta += float(sums[0])
    tally.lost += float(sums[1])
    tally.wanted += int(sums[2])
    tally.swallowed += int(sums[3])
    return raw


def _cast_any(
    result: np.ndarray, base: np.ndarray | None, is_delta: bool, dtype: str, space: Workspace
) -> tuple[np.ndarray, bool, np.ndarray]:
    """The cast to any dtype: bytes, whether all are finite, and the sums of the tally."""
    wide = result
    if is_delta:
        assert base is not None
        with np.errstate(over="ignore", invalid="ignore"):
            wide = np.add(base, result, out=space.take("wide", result.size, result.dtype))
    raw = storage.narrow(wide, dtype, space.take("out", result.size * 8, np.uint8))
    back = space.take("back", result.size, result.dtype)
    good = storage.widen(raw, dtype, back)
    sums = np.zeros(4, np.float64)
    if good:
        _tally(wide, wide if base is None else base, back, sums)
    return raw, good, sums


@njit(nogil=True, cache=True, error_model="numpy")
def _cast_bfloat16(result, base, is_delta, bits):  # type: ignore[no-untyped-def]
    """As `_cast_any`, a part at a time, so that what it goes over again is still in the nearest cache."""
    sums, wide, back = np.zeros(4, np.float64), np.empty(PART, np.float32), np.empty(PART, np.float32)
    for first in range(0, result.size, PART):
        part, start, wanted = bits[first : first + PART], base[first : first + PART], result[first : first + PART]
        n = part.size
        if is_delta:
            for i in range(n):
                wide[i] = start[i] + wanted[i]
        else:
            wide[:n] = wanted
        storage.narrow_bfloat16(wide[:n].view(np.uint32), part)
        if storage.widen_bfloat16(part, back[:n]):
            return False, sums
        _tally(wide[:n], start, back[:n], sums)
    return True, sums


@njit(nogil=True, cache=True, error_model="numpy")
def _tally(wide, base, back, sums):  # type: ignore[no-untyped-def]
    for first in range(0, wide.size, PART):
        part = slice(first, first + PART)
        moved, lost = _squares(wide[part], base[part], back[part])
        wanted, swallowed = _counts(wide[part], base[part], back[part])
        sums[0] += moved
        sums[1] += lost
        sums[2] += wanted
        sums[3] += swallowed


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})  # a report's sums, not a weight
def _squares(wide, base, back):  # type: ignore[no-untyped-def]
    moved = wide[0] - wide[0]
    lost = moved
    for i in range(wide.size):
        change, error = wide[i] - base[i], back[i] - wide[i]
        moved += change * change
        lost += error * error
    return moved, lost


@njit(nogil=True, cache=True, error_model="numpy")
def _counts(wide, base, back):  # type: ignore[no-untyped-def]
    wanted, swallowed = np.int32(0), np.int32(0)
    for i in range(wide.size):
        wanted += np.int32(wide[i] != base[i])
        swallowed += np.int32((wide[i] != base[i]) & (back[i] == base[i]))
    return wanted, swallowed
