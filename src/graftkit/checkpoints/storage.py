"""Between the bytes of a file and numbers to compute with: the only place that knows what bfloat16 looks like.

Arrays hold float16 and bfloat16 as bits (`uint16`) while they are on their way; arithmetic happens in float32 or
float64. Loops are compiled by numba, without fast-math where a weight is concerned, and release the interpreter lock.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from graftkit.compiling import compiled

FULL, CARRY, SIGN = np.uint16(0x7F80), np.uint16(0x0080), np.uint16(0x8000)
"""A bfloat16's exponent; what makes a full one carry; and where the carry shows."""

HALF, MIDDLE = np.uint32(16), np.uint32(0x80000000)
"""How far float32's bits lie above bfloat16's; and the lower ones of a number in the middle of two, shifted up."""

STORAGE = {
    "F64": np.float64, "F32": np.float32, "F16": np.uint16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
    "BOOL": np.uint8,
}  # fmt: skip
"""How the elements of a file's dtype lie in memory."""


def widen(raw: np.ndarray, dtype: str, out: np.ndarray) -> bool:
    """Numbers from a file's bytes (`raw` uint8) into `out` (float32 or float64), exactly; whether all are finite."""
    bits = raw.view(STORAGE[dtype])
    if dtype == "BF16":
        return not widen_bfloat16(bits, out)
    if dtype == "F16":
        _widen_table(bits, _half_table(), out)
    else:
        np.copyto(out, bits, casting="same_kind")
    return finite(raw, dtype)


def as_float(raw: np.ndarray, dtype: str, float_dtype: Any) -> np.ndarray:
    """As `widen`, into a new array, finite or not."""
    out = np.empty(raw.size // np.dtype(STORAGE[dtype]).itemsize, float_dtype)
    widen(raw, dtype, out)
    return out


def subtract(raw: np.ndarray, dtype: str, base: np.ndarray, out: np.ndarray) -> bool:
    """`number(raw) - base` into `out`, the delta of one block of a tuned model; whether all numbers are finite."""
    if dtype == "BF16":
        return not subtract_bfloat16(raw.view(np.uint16), base, out)
    good = widen(raw, dtype, out)
    np.subtract(out, base, out=out)
    return good


def finite(raw: np.ndarray, dtype: str) -> bool:
    """Whether no element of a block is NaN or infinite, read off the exponent bits."""
    if dtype == "BF16":
        return not _exponent_full(raw.view(np.uint16), np.uint16(0x7F80))
    if dtype == "F16":
        return not _exponent_full(raw.view(np.uint16), np.uint16(0x7C00))
    if dtype in ("F32", "F64"):
        return bool(_all_finite(raw.view(STORAGE[dtype])))
    return True


def narrow(wide: np.ndarray, dtype: str, out: np.ndarray) -> np.ndarray:
    """Casts `wide` (float32 or float64) to a file's dtype in the head of `out` (uint8), to nearest, ties to even.

    Returns the bytes written. A float64 is rounded once on its way to 16 bits.
    """
    view = out[: wide.size * np.dtype(STORAGE[dtype]).itemsize]
    if dtype == "BF16":
        bits = wide.view(np.uint32) if wide.dtype == np.float32 else _bits_of_odd(wide)
        narrow_bfloat16(bits, view.view(np.uint16))
    elif dtype == "F16":
        with np.errstate(over="ignore"):
            np.copyto(view.view(np.float16), wide, casting="same_kind")
    else:
        np.copyto(view.view(STORAGE[dtype]), wide, casting="same_kind")
    return view


def as_bytes(wide: np.ndarray, dtype: str) -> np.ndarray:
    """As `narrow`; what has the dtype already is looked at as it lies in memory."""
    if wide.dtype == STORAGE[dtype]:
        return wide.view(np.uint8)
    return narrow(wide, dtype, np.empty(wide.size * 8, np.uint8))


def _bits_of_odd(wide: np.ndarray) -> np.ndarray:
    """Bits of float64 numbers as float32, rounded to odd: an inexact one ends in a 1 and lies nearer to zero.

    Rounding that to 16 bits gives what one rounding of the float64 would; from the nearest float32 it would not.
    """
    with np.errstate(over="ignore"):
        near = wide.astype(np.float32)
    bits = near.view(np.uint32)
    bits -= np.abs(near) > np.abs(wide)
    bits |= bits.view(np.float32) != wide
    return bits


def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`left [rows, r] @ right [r, columns]`, always added in the order of r.

    A library's product would run on threads of its own, beside the workers', and its last bits would depend on them.
    """
    out = np.zeros((left.shape[0], right.shape[1]), left.dtype)
    add_products(left, right, out)
    return out


@compiled
def add_products(left: np.ndarray, right: np.ndarray, out: np.ndarray) -> None:
    """Adds `left @ right`, each element in the order of r; four rows share what is read of `right`."""
    rows, most = left.shape[0] - left.shape[0] % 4, right.shape[0] - right.shape[0] % 4
    for i in range(0, rows, 4):
        for k in range(0, most, 4):
            add_tile(left, right, i, k, 0, out.shape[1], out[i : i + 4])
        for k in range(most, right.shape[0]):
            for row in range(i, i + 4):
                add_scaled(left[row, k], right[k], out[row])
    for row in range(rows, left.shape[0]):
        for k in range(right.shape[0]):
            add_scaled(left[row, k], right[k], out[row])


@compiled
def add_tile(left: np.ndarray, right: np.ndarray, i: int, k: int, first: int, n: int, out: np.ndarray) -> None:
    """Four rows from `i` on and four directions from `k` on: sixteen products for eight numbers that are read.

    The head of `out` [4, columns] takes `n` columns from `first` on.
    """
    p0, p1, p2, p3 = left[i, k], left[i, k + 1], left[i, k + 2], left[i, k + 3]
    q0, q1, q2, q3 = left[i + 1, k], left[i + 1, k + 1], left[i + 1, k + 2], left[i + 1, k + 3]
    s0, s1, s2, s3 = left[i + 2, k], left[i + 2, k + 1], left[i + 2, k + 2], left[i + 2, k + 3]
    t0, t1, t2, t3 = left[i + 3, k], left[i + 3, k + 1], left[i + 3, k + 2], left[i + 3, k + 3]
    a, b, c, d, last = out[0], out[1], out[2], out[3], first + n
    e, f, g, h = right[k, first:last], right[k + 1, first:last], right[k + 2, first:last], right[k + 3, first:last]
    for j in range(n):
        r0, r1, r2, r3 = e[j], f[j], g[j], h[j]
        a[j] = (((a[j] + p0 * r0) + p1 * r1) + p2 * r2) + p3 * r3
        b[j] = (((b[j] + q0 * r0) + q1 * r1) + q2 * r2) + q3 * r3
        c[j] = (((c[j] + s0 * r0) + s1 * r1) + s2 * r2) + s3 * r3
        d[j] = (((d[j] + t0 * r0) + t1 * r1) + t2 * r2) + t3 * r3


@compiled
def add_scaled(factor: float, direction: np.ndarray, row: np.ndarray) -> None:
    """Adds a multiple of a direction to a row."""
    for j in range(row.size):
        row[j] += factor * direction[j]


@lru_cache(maxsize=1)
def _half_table() -> np.ndarray:
    """Every float16 as a float32, by its bits."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


@compiled
def widen_bfloat16(bits: np.ndarray, out: np.ndarray) -> int:
    """Bits to numbers; not 0 where one is not finite."""
    broken = np.uint16(0)
    for i in range(out.size):
        b = bits[i]
        out[i] = np.uint32(np.uint32(b) << np.uint32(16)).view(np.float32)
        broken = np.uint16(broken | np.uint16(np.uint16(b & FULL) + CARRY))  # sums of uint16 are 64 bits wide otherwise
    return broken & SIGN


@compiled
def _widen_table(bits, table, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        out[i] = table[bits[i]]


@compiled
def subtract_bfloat16(bits: np.ndarray, base: np.ndarray, out: np.ndarray) -> int:
    """Bits to numbers less the base's; not 0 where one of the numbers is not finite."""
    broken = np.uint16(0)
    for i in range(out.size):
        b = bits[i]
        out[i] = np.uint32(np.uint32(b) << np.uint32(16)).view(np.float32) - base[i]
        broken = np.uint16(broken | np.uint16(np.uint16(b & FULL) + CARRY))
    return broken & SIGN


@compiled
def _exponent_full(bits, mask):  # type: ignore[no-untyped-def]
    found = 0
    for i in range(bits.size):
        found += (bits[i] & mask) == mask
    return found


@compiled
def _all_finite(values):  # type: ignore[no-untyped-def]
    bad = 0
    for i in range(values.size):
        bad += not np.isfinite(values[i])
    return bad == 0


@compiled
def copy_finite(bits: np.ndarray, out: np.ndarray) -> bool:
    """Copies the bits of float32 numbers; whether all are finite."""
    broken = np.uint32(0)
    for i in range(out.size):
        out[i] = bits[i]
        full = np.uint32(bits[i] & np.uint32(0x7F800000))
        broken = np.uint32(broken | np.uint32(full + np.uint32(0x00800000)))
    return broken & np.uint32(0x80000000) == 0


@compiled
def narrow_bfloat16(bits: np.ndarray, out: np.ndarray) -> None:
    """The bits of float32 numbers to those of the nearest bfloat16, ties to even."""
    for i in range(out.size):
        u = bits[i]
        out[i] = np.uint16((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compiled
def shorten(wide: np.ndarray, out: np.ndarray) -> None:
    """float64 to float32 so that rounding the result to bfloat16 equals rounding `wide` to bfloat16.

    Rounding twice goes wrong only where the first lands in the middle between two bfloat16: there the result is moved
    by one bit to the side on which `wide` lies.
    """
    for i in range(out.size):
        out[i] = np.float32(wide[i])
    bits, middles = out.view(np.uint32), np.uint32(0)
    for i in range(out.size):
        middles = np.uint32(middles | np.uint32(np.uint32(bits[i] << HALF) == MIDDLE))
    if middles:
        _leave_middles(bits, wide)


@compiled
def _leave_middles(bits, wide):  # type: ignore[no-untyped-def]
    none, up, down = np.uint32(0), np.uint32(1), np.uint32(0xFFFFFFFF)
    for i in range(bits.size):  # choices, not branches: they vectorise
        near = np.uint32(bits[i])
        rest = np.float32(wide[i] - np.float64(near.view(np.float32)))
        step = up if np.uint32(np.uint32(near ^ rest.view(np.uint32)) >> np.uint32(31)) == none else down
        step = step if rest != np.float32(0) else none
        step = step if np.uint32(near << HALF) == MIDDLE else none
        bits[i] = np.uint32(near + step)
