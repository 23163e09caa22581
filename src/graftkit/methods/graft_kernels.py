"""Compiled twins of the gated methods (`graft.py`), as those in `kernels.py`: flat blocks, and the rows' gates."""

from __future__ import annotations

import numpy as np

from graftkit.compiling import compiled
from graftkit.methods.graft import equal_gates, graft_weights


def graft(
    models: np.ndarray,
    signals: np.ndarray,
    gates: np.ndarray,
    *,
    a: float,
    c: float,
    bins: int,
    last_bin: str,
    normaliser: str,
    global_signal: str,
    local_signal: str,
    sharpness: float,
    of: str,
    out: np.ndarray,
) -> None:
    """Twin of `graft.graft`; what `bins`, `last_bin`, `global_signal` and `of` say is in the signals already."""
    chosen = gates if local_signal == "gates" else equal_gates(gates)
    graft_convex(
        models,
        graft_weights(signals, chosen, a=a, c=c, normaliser=normaliser, sharpness=sharpness),
        local_signal="gates",
        out=out,
    )


def graft_convex(models: np.ndarray, gates: np.ndarray, *, local_signal: str, out: np.ndarray) -> None:
    """Twin of `graft.graft_convex`."""
    weights = (gates if local_signal == "gates" else equal_gates(gates)).astype(models.dtype)
    rows, columns = weights.shape[1], models.shape[1] // max(weights.shape[1], 1)
    if columns:
        _fuse(models.reshape(len(models), rows, columns), weights, out.reshape(rows, columns))


def graft_free(deltas: np.ndarray, gates: np.ndarray, *, scale: float, local_signal: str, out: np.ndarray) -> None:
    """Twin of `graft.graft_free`."""
    alpha = (gates if local_signal == "gates" else equal_gates(gates)).astype(deltas.dtype)
    rows, columns = alpha.shape[1], deltas.shape[1] // max(alpha.shape[1], 1)
    if columns:
        shaped = deltas.reshape(len(deltas), rows, columns)
        _add(shaped, alpha, deltas.dtype.type(scale), out.reshape(rows, columns))


@compiled
def _fuse(stack, weights, out):  # type: ignore[no-untyped-def]
    whole = weights.shape[2] == 1
    for i in range(out.shape[0]):
        first, row = stack[0, i], out[i]
        row[:] = first
        for t in range(1, len(stack)):
            other, own = stack[t, i], weights[t, i]
            if whole:
                share = own[0]
                for j in range(row.size):
                    row[j] += share * (other[j] - first[j])
            else:
                for j in range(row.size):
                    row[j] += own[j] * (other[j] - first[j])


@compiled
def _add(stack, alpha, scale, out):  # type: ignore[no-untyped-def]
    whole = alpha.shape[2] == 1
    for i in range(out.shape[0]):
        row = out[i]
        for t in range(len(stack)):
            for j in range(row.size):
                part = alpha[t, i, 0 if whole else j] * stack[t, i, j]
                row[j] = part if t == 0 else row[j] + part
        for j in range(row.size):
            row[j] *= scale
