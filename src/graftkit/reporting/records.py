"""What a report shows of merges: their records (`graft.json`) as tables and as grids of layers by roles."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from graftkit.errors import DataError
from graftkit.measuring.results import parsed
from graftkit.measuring.table import Cell, Column, Table
from graftkit.reporting import plots

if TYPE_CHECKING:
    from pydantic import TypeAdapter

FORMAT = 1
_MOST_ROLES = 10


@dataclass(frozen=True)
class TensorFacts:
    """What a record says of one tensor; None where it does not say."""

    name: str = ""
    shape: tuple[int, ...] = ()
    delta_norm: float | None = None
    cast_error_norm: float | None = None
    error_norm: float | None = None  # of what an adapter's rank leaves out
    unchanged: float | None = None
    weights: tuple[tuple[float, ...], ...] = ()
    mean_weights: tuple[float, ...] = ()
    w_global: tuple[float, ...] = ()
    entropy: tuple[float, ...] = ()
    spectral: tuple[float, ...] = ()

    @property
    def size(self) -> int:
        """Its number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class InputFacts:
    """What a record says of a model that was merged, or of the base."""

    role: str = "–"
    source: str = "–"
    kind: str = "–"
    fingerprint: str = "–"
    directory: str = ""


@dataclass(frozen=True)
class OutputFacts:
    """What a recipe says of its output's form."""

    like: str = ""
    align: str = ""


@dataclass(frozen=True)
class RecipeFacts:
    """What a record holds of its recipe, beside its text."""

    output: OutputFacts = OutputFacts()


@dataclass(frozen=True)
class PlanFacts:
    """What a record says of the plan."""

    hash: str = ""
    steps: int | None = None
    bytes_read: int | None = None
    bytes_written: int | None = None


@dataclass(frozen=True)
class RunFacts:
    """What a record says of the run."""

    seconds: float | None = None
    peak_memory_bytes: int | None = None
    workers: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class Record:
    """A merge's record, the content of `graft.json`; what it does not say, or says as null, is left at its default."""

    recipe_yaml: str = ""
    recipe: RecipeFacts = RecipeFacts()
    plan: PlanFacts = PlanFacts()
    execution: RunFacts = RunFacts()
    inputs: tuple[InputFacts, ...] = ()
    tensors: tuple[TensorFacts, ...] = ()
    notes: tuple[str, ...] = ()
    gates: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)
    machine: Mapping[str, str | int | None] = field(default_factory=dict)


def read(data: Any, where: str = "record") -> Record:
    """A record from its JSON. Raises DataError, with the place, where it is none or holds what no record holds."""
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        held = ", ".join(sorted(map(str, data))[:8]) if isinstance(data, Mapping) else type(data).__name__
        raise DataError(f"{where}: not a merge's record of format {FORMAT}: it has {held or 'nothing'}")
    found: Record = parsed(_adapter(), _without_nulls(data), f"{where}: not a merge's record")
    return found


@cache
def _adapter() -> TypeAdapter[Record]:
    from pydantic import TypeAdapter

    return TypeAdapter(Record)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value if part is not None] if isinstance(value, list) else value


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


def heat_map(grid: Grid, label: str, **how: Any) -> str:
    """A grid as a picture, layers downwards; `how` as `plots.heat_map` takes it."""
    return plots.heat_map(grid.values, grid.layers, grid.roles, label=label, rows_are="layer", **how)


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
    rows = tuple(tuple(getattr(source, key) for key in keys) for source in record.inputs)
    return Table(tuple(Column(key) for key in keys), rows)


def deltas_table(merges: Sequence[tuple[str, Record]]) -> Table:
    """Merges by the norm of their delta, the relative error of the cast and the share of changes that it swallowed, and
    what an adapter's rank left out; a column that no merge has is left out."""
    columns = (
        Column("merge"), Column("tensors"), Column("delta norm", "", None, 2),
        Column("cast error", "% of the delta", None, 2), Column("swallowed by the cast", "% of weights", None, 1),
        Column("left out by the rank", "% of the delta", None, 2),
    )  # fmt: skip
    rows = [_delta(name, record.tensors) for name, record in merges]
    kept = [place for place in range(len(columns)) if place < 3 or any(row[place] is not None for row in rows)]
    return Table(tuple(columns[place] for place in kept), tuple(tuple(row[place] for place in kept) for row in rows))


def norm_grids(record: Record) -> list[Grid]:
    """Delta norms by layer and role, one grid per stack of layers; tensors of one place add up as vectors."""
    found = [(t.name, t.delta_norm, t.size) for t in record.tensors if t.delta_norm is not None]
    return grids(found, lambda values: math.sqrt(sum(value * value for value, _ in values)))


def swallowed_grids(record: Record) -> list[Grid]:
    """Percent of the weights whose change the cast swallowed, by layer and role."""
    found = [(t.name, t.unchanged, t.size) for t in record.tensors if t.unchanged is not None]
    return grids(found, lambda values: 100 * mean(values))


def cast_grids(record: Record) -> list[Grid]:
    """The error of the cast in percent of the delta, by layer and role."""
    return _errors(record, "cast_error_norm")


def rank_grids(record: Record) -> list[Grid]:
    """What an adapter's rank left out in percent of the delta, by layer and role."""
    return _errors(record, "error_norm")


def _errors(record: Record, kind: str) -> list[Grid]:
    measured = [(t.name, getattr(t, kind), t.delta_norm, t.size) for t in record.tensors]
    found = [(name, 100 * error / norm, size) for name, error, norm, size in measured if error is not None and norm]
    return grids(found, mean)


def grids(
    measured: Sequence[tuple[str, float, int]],
    combine: Callable[[Sequence[tuple[float, int]]], float],
    *,
    keep: bool = False,
) -> list[Grid]:
    """Values of tensors (name, value, number of weights) by layer and role; `combine` makes one of several there.

    Roles whose values are all 0 are left out, unless asked to `keep` them.
    """
    found: dict[str, dict[tuple[int, str], list[tuple[float, int]]]] = defaultdict(lambda: defaultdict(list))
    for name, value, size in measured:
        place = _place(name)
        if place is not None:
            stack, layer, role = place
            found[stack][layer, role].append((value, size))
    made = (_grid(stack, {at: combine(values) for at, values in cells.items()}, keep) for stack, cells in found.items())
    return [grid for grid in made if grid.roles]


def _grid(stack: str, cells: Mapping[tuple[int, str], float], keep: bool) -> Grid:
    layers = sorted({layer for layer, _ in cells})
    roles = list(dict.fromkeys(role for (_, role), value in cells.items() if keep or value != 0))
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
    run, plan = record.execution, record.plan
    mib = [None if value is None else value / 2**20 for value in (
        run.peak_memory_bytes, plan.bytes_read, plan.bytes_written
    )]  # fmt: skip
    return name, run.seconds, *mib, plan.steps, run.workers, run.device


def _delta(name: str, tensors: Sequence[TensorFacts]) -> tuple[Cell, ...]:
    norm = _norm([tensor.delta_norm for tensor in tensors])
    cast, rank = (_norm([getattr(t, kind) for t in tensors]) for kind in ("cast_error_norm", "error_norm"))
    unchanged = [(tensor.unchanged, tensor.size) for tensor in tensors if tensor.unchanged is not None]
    relative = [100 * error / norm if norm and error is not None else None for error in (cast, rank)]
    return name, len(tensors), norm, relative[0], 100 * mean(unchanged) if unchanged else None, relative[1]


def _norm(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return math.sqrt(sum(value * value for value in found)) if found else None


def mean(found: Sequence[tuple[float, int]]) -> float:
    """The mean of values weighted by how many weights each stands for."""
    total = sum(weight for _, weight in found)
    return sum(value * weight for value, weight in found) / total if total else 0.0
