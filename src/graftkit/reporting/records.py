"""What a report shows of merges: their records (`graft.json`) as tables and as grids of layers by roles."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftkit.measuring.table import Cell, Column, Table

Record = Mapping[str, Any]
_MOST_ROLES = 10


@dataclass(frozen=True)
class Grid:
    """Values of one kind by layer and role `[layers, roles]`, NaN where there is no tensor; `stack` names them."""

    stack: str
    layers: tuple[str, ...]
    roles: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]

    def known(self) -> list[float]:
        """The values that are there."""
        return [value for row in self.values for value in row if not math.isnan(value)]


def costs_table(merges: Sequence[tuple[str, Record]]) -> Table:
    """Merges by seconds, peak memory, bytes read and written, workers and steps; what a record lacks stays empty."""
    columns = (
        Column("merge"), Column("time", "s", "lower", 1), Column("peak memory", "MiB", "lower", 0),
        Column("read", "MiB", None, 1), Column("written", "MiB", None, 1), Column("steps"), Column("workers"),
        Column("device"),
    )  # fmt: skip
    return Table(columns, tuple(_cost(name, record) for name, record in merges))


def inputs_table(record: Record) -> Table:
    """The inputs of a merge: role, source, kind, fingerprint."""
    keys = ("role", "source", "kind", "fingerprint")
    rows = tuple(tuple(str(source.get(key, "–")) for key in keys) for source in record.get("inputs", ()))
    return Table(tuple(Column(key) for key in keys), rows)


def deltas_table(merges: Sequence[tuple[str, Record]]) -> Table:
    """Merges by the norm of their delta, the relative error of the cast, and the share of changes that it swallowed."""
    columns = (
        Column("merge"), Column("tensors"), Column("delta norm", "", None, 2),
        Column("cast error", "% of the delta", None, 2), Column("swallowed by the cast", "% of weights", None, 1),
    )  # fmt: skip
    return Table(columns, tuple(_delta(name, record.get("tensors", ())) for name, record in merges))


def norm_grids(record: Record) -> list[Grid]:
    """Delta norms by layer and role, one grid per stack of layers; tensors of one place add up as vectors."""
    return _grids(record, "delta_norm", lambda found: math.sqrt(sum(value * value for value, _ in found)))


def swallowed_grids(record: Record) -> list[Grid]:
    """Percent of the weights whose change the cast swallowed, by layer and role."""
    return _grids(record, "unchanged", lambda found: 100 * _mean(found))


def _grids(record: Record, key: str, combine: Any) -> list[Grid]:
    found: dict[str, dict[tuple[int, str], list[tuple[float, int]]]] = defaultdict(lambda: defaultdict(list))
    for tensor in record.get("tensors", ()):
        place = _place(tensor.get("name", ""))
        if place is not None and tensor.get(key) is not None:
            stack, layer, role = place
            found[stack][layer, role].append((float(tensor[key]), math.prod(tensor.get("shape", ()))))
    return [_grid(stack, {at: combine(values) for at, values in cells.items()}) for stack, cells in found.items()]


def _grid(stack: str, cells: Mapping[tuple[int, str], float]) -> Grid:
    layers = sorted({layer for layer, _ in cells})
    roles = list(dict.fromkeys(role for _, role in cells))
    if len(roles) > _MOST_ROLES:
        weight = {role: sum(abs(value) for (_, r), value in cells.items() if r == role) for role in roles}
        roles = [role for role in roles if role in sorted(roles, key=lambda role: -weight[role])[:_MOST_ROLES]]
    values = tuple(tuple(cells.get((layer, role), math.nan) for role in roles) for layer in layers)
    return Grid(stack, tuple(map(str, layers)), tuple(roles), values)


def _place(name: str) -> tuple[str, int, str] | None:
    """Stack, layer and role of a tensor: `model.layers.3.self_attn.q_proj.weight` -> `model.layers`, 3, `q_proj`."""
    match = re.match(r"(.*?)\.(\d+)\.(.+)$", name)
    if match is None:
        return None
    stack, layer, rest = match.groups()
    parts = [part for part in rest.split(".") if not part.isdigit()]
    suffix = parts.pop() if len(parts) > 1 else ""
    role = parts[-1] + (f".{suffix}" if suffix not in ("weight", "") else "")
    return stack, int(layer), "experts." + role if "experts" in parts[:-1] else role


def _cost(name: str, record: Record) -> tuple[Cell, ...]:
    execution, plan = record.get("execution", {}), record.get("plan", {})
    mib = [_mib(value) for value in (
        execution.get("peak_memory_bytes"), plan.get("bytes_read"), plan.get("bytes_written")
    )]  # fmt: skip
    seconds = execution.get("seconds")
    device = execution.get("device")
    return (
        name, None if seconds is None else float(seconds), *mib, plan.get("steps"), execution.get("workers"),
        None if device is None else str(device),
    )  # fmt: skip


def _delta(name: str, tensors: Sequence[Mapping[str, Any]]) -> tuple[Cell, ...]:
    norm = _norm(tensors, "delta_norm")
    error = _norm(tensors, "cast_error_norm")
    unchanged = [(t["unchanged"], math.prod(t.get("shape", ()))) for t in tensors if t.get("unchanged") is not None]
    relative = 100 * error / norm if norm and error is not None else None
    return name, len(tensors), norm, relative, 100 * _mean(unchanged) if unchanged else None


def _norm(tensors: Sequence[Mapping[str, Any]], key: str) -> float | None:
    found = [float(tensor[key]) for tensor in tensors if tensor.get(key) is not None]
    return math.sqrt(sum(value * value for value in found)) if found else None


def _mean(found: Sequence[tuple[float, int]]) -> float:
    """The mean of values weighted by how many weights each stands for."""
    total = sum(weight for _, weight in found)
    return sum(value * weight for value, weight in found) / total if total else 0.0


def _mib(value: float | None) -> float | None:
    return None if value is None else value / 2**20
