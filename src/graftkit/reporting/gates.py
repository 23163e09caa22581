"""What gates made of the models: the weights that each matrix gave them, as tables and as layers by modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.measuring.table import Cell, Column, Table
from graftkit.reporting import plots, records
from graftkit.reporting.records import Record, TensorFacts

if TYPE_CHECKING:
    from graftkit.checkpoints.gates import Gates

SHOWN = 4  # models that have pictures of their own, at most


def gates_table(name: str, record: Record, tensors: bool = False) -> Table | None:
    """By module, or by matrix: signal, w_global, and the weights of each model; None where a merge has no gates.

    Least and largest are over all channels of all matrices, the other numbers are means over matrices.
    """
    gated = [tensor for tensor in record.tensors if tensor.weights]
    if not gated:
        return None
    groups: dict[str, list[TensorFacts]] = {}
    for tensor in gated:
        groups.setdefault(tensor.name if tensors else _module(tensor.name), []).append(tensor)
    groups |= {} if tensors else {"all": gated}
    signal = next((kind for kind in ("entropy", "spectral") if any(getattr(t, kind) for t in gated)), "entropy")
    heads = (Column("part"), Column("model"), Column(signal, "", None, 4), Column("w_global", "", None, 3))
    spread = tuple(Column(part, "", None, 3) for part in ("least", "5 %", "median", "95 %", "largest", "mean"))
    rows = [row for part, own in groups.items() for row in _rows(part, own, signal, _models(record))]
    return Table((*heads, *spread), tuple(rows), title=f"weights by gates in {name}")


def _module(name: str) -> str:
    return next((part for part in reversed(name.split(".")) if part not in ("weight", "bias")), name)


def _models(record: Record) -> list[str]:
    return [Path(source.source).name for source in record.inputs if source.role == "model"]


def _rows(part: str, own: Sequence[TensorFacts], signal: str, names: Sequence[str]) -> Iterator[tuple[Cell, ...]]:
    for t in range(len(own[0].weights)):
        spread = [tensor.weights[t] for tensor in own]
        middle = [_mean([quantiles[k] for quantiles in spread]) for k in (1, 2, 3)]
        low, high = min(quantiles[0] for quantiles in spread), max(quantiles[4] for quantiles in spread)
        seen = [getattr(tensor, signal)[t] for tensor in own if getattr(tensor, signal)]
        share = [tensor.w_global[t] for tensor in own if tensor.w_global]
        label = names[t] if t < len(names) else f"model {t + 1}"
        numbers = (_mean(seen), _mean(share), low, *middle, high, _mean([tensor.mean_weights[t] for tensor in own]))
        yield part, label, *numbers


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def file_table(gates: Gates, tensors: bool = False) -> Table:
    """The values of a file of gates by module, or by matrix: least, median, largest and mean of each model's."""
    import numpy as np

    groups: dict[str, list[Any]] = {}
    for name in gates.tensors:
        values = gates.values(name).reshape(len(gates.models), -1)
        groups.setdefault(name if tensors else _module(name), []).append(values)
    rows: list[tuple[Cell, ...]] = []
    for part, own in groups.items():
        for t, values in enumerate(np.concatenate(own, axis=1)):
            numbers = (float(values.min()), float(np.median(values)), float(values.max()), float(values.mean()))
            rows.append((part, t + 1, values.size, *numbers))
    heads = (Column("part"), Column("model"), Column("values"))
    spread = tuple(Column(part, "", None, 3) for part in ("least", "median", "largest", "mean"))
    title = f"{gates.file}: {gates.kind}s by {gates.granularity} of {len(gates.tensors)} matrices"
    return Table((*heads, *spread), tuple(rows), title=title)


def pictures(record: Record) -> list[tuple[str, str]]:
    """Captions and pictures: mean weight of each model, its spread in a matrix, signals, the training's curve."""
    gated = [tensor for tensor in record.tensors if tensor.weights]
    if not gated:
        return []
    count, names = len(gated[0].weights), _models(record)
    shown = 1 if count == 2 and not _free(record) else min(count, SHOWN)
    labels = [names[t] if t < len(names) else f"model {t + 1}" for t in range(count)]
    found: list[tuple[str, str]] = []
    for t in range(shown):
        means = [(tensor.name, tensor.mean_weights[t], tensor.size) for tensor in gated]
        for grid in records.grids(means, records.mean, keep=True):
            picture = records.heat_map(grid, "mean weight", middle=1 / count)
            found.append((f"Weight of {labels[t]} ({grid.stack})", picture))
        spread = [(tensor.name, tensor.weights[t][4] - tensor.weights[t][0], tensor.size) for tensor in gated]
        for grid in records.grids(spread, records.mean, keep=True):
            picture = records.heat_map(grid, "largest - least", color=plots.OTHER)
            found.append((f"How far it differs between channels ({grid.stack})", picture))
    return [*found, *_signals(gated, labels), *_curve(record)]


def _free(record: Record) -> bool:
    return record.gates.get("kind") == "coefficient"


def _signals(gated: Sequence[TensorFacts], labels: Sequence[str]) -> Iterator[tuple[str, str]]:
    for signal in ("entropy", "spectral"):
        seen = [(t.name, getattr(t, signal), t.size) for t in gated if getattr(t, signal)]
        apart = [(name, own[0] - sum(own[1:]) / (len(own) - 1), size) for name, own, size in seen]
        for grid in records.grids(apart, records.mean, keep=True):
            picture = records.heat_map(grid, "difference", middle=0.0)
            yield f"{signal.capitalize()} of {labels[0]} less that of the others ({grid.stack})", picture


def _curve(record: Record) -> Iterator[tuple[str, str]]:
    """The loss of the training that the gates come from."""
    course = record.gates.get("training", {}).get("course", {})
    points = course.get("curve") or ()
    if len(points) < 2:
        return
    steps = [point[0] for point in points]
    lines: dict[str, list[float | None]] = {"loss of each step": [point[1] for point in points]}
    looks = {point[0]: point[3] for point in points if len(point) > 3 and point[3] is not None}
    if course.get("first") is not None and looks:
        looks = {0: course["first"]} | looks
        steps, lines = [0, *steps], {name: [None, *values] for name, values in lines.items()}
    if looks:
        lines["loss on dev"] = _between(steps, looks)
    yield "How the gates were learnt", plots.line_plot(steps, lines, xlabel="step", ylabel="nats per answer token")


def _between(steps: Sequence[int], looks: Mapping[int, float]) -> list[float | None]:
    """Looks at dev, with straight lines between them."""
    places = sorted(looks)
    found: list[float | None] = []
    for step in steps:
        before = max((p for p in places if p <= step), default=None)
        after = min((p for p in places if p >= step), default=None)
        if before is None or after is None:
            found.append(None)
            continue
        share = (step - before) / (after - before) if after > before else 0.0
        found.append(looks[before] + share * (looks[after] - looks[before]))
    return found
