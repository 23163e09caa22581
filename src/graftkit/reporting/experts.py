"""What a report shows of the models that were merged: how far each lies from the base, and how any two get on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.errors import CheckpointError, PlanError
from graftkit.measuring.table import Column, Table
from graftkit.reporting import plots, records
from graftkit.reporting.records import InputFacts

if TYPE_CHECKING:
    from graftkit.execution.local import Progress
    from graftkit.measuring.findings import Breakdown, Inspection, Pair

_MOST_PAIRS = 3  # with a heat map of their own


@dataclass(frozen=True)
class Beside:
    """The inputs of some merges, measured against their base and each other; or `missing` says why they are not.

    `apart`: the vision-language model among them, which is compared with nothing.
    """

    merges: tuple[str, ...]
    found: Inspection | None = None
    missing: str = ""
    apart: str = ""


def measure_experts(
    merges: Sequence[tuple[str, Mapping[str, Any]]], workers: int = 1, progress: Progress | None = None
) -> list[Beside]:
    """The inputs of every merge, those of several merges once; reads all of their weights.

    Nothing is measured where a directory is gone, or holds other weights than the record's fingerprint says.
    """
    sets: dict[tuple[str, tuple[InputFacts, ...]], list[str]] = {}
    for name, data in merges:
        record = records.read(data, name)
        apart = record.recipe.output.like if record.recipe.output.align else ""
        inputs = tuple(dict.fromkeys(one for one in record.inputs if not apart or one.source != apart))
        if any(one.role == "model" for one in inputs):
            sets.setdefault((apart, inputs), []).append(name)
    return [
        replace(_measured(tuple(names), inputs, workers, progress), apart=apart)
        for (apart, inputs), names in sets.items()
    ]


def _measured(names: tuple[str, ...], inputs: Sequence[InputFacts], workers: int, progress: Progress | None) -> Beside:
    from graftkit.measuring.inspection import inspect

    missing = next(filter(None, map(_missing, inputs)), "")
    if missing:
        return Beside(names, missing=missing)
    base = next((one.directory for one in inputs if one.role == "base"), None)
    models = [one for one in inputs if one.role == "model"]
    try:
        return Beside(names, _named(inspect([one.directory for one in models], base, workers, progress), models))
    except (PlanError, CheckpointError) as error:
        return Beside(names, missing=str(error))


def _named(found: Inspection, models: Sequence[InputFacts]) -> Inspection:
    """Recipes by their file's name: their results lie in directories that are named by hashes."""
    recipes = {
        facts.name: Path(one.source).name
        for facts, one in zip(found.models, models, strict=True)
        if one.kind == "recipe"
    }

    def called(models: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(recipes.get(name, name) for name in models)

    changes = tuple(replace(one, models=called(one.models)) for one in found.changes)
    return replace(found, changes=changes, pairs=tuple(replace(one, models=called(one.models)) for one in found.pairs))


def _missing(one: InputFacts) -> str:
    from graftkit.checkpoints.adapters import Adapter
    from graftkit.checkpoints.resolve import open_source
    from graftkit.checkpoints.sources import full_hash

    if not one.directory or not Path(one.directory).is_dir():
        return f"{one.source} is not at {one.directory or 'any place that the record names'} any more"
    try:
        source = open_source(Path(one.directory))
    except CheckpointError as error:
        return str(error)
    files = (source.store if isinstance(source, Adapter) else source).files
    source.close()
    same = one.kind == "recipe" or one.fingerprint in (source.fingerprint(), full_hash(files))
    return "" if same else f"{one.source} holds other weights now than those that were merged"


def pairs_table(found: Inspection) -> Table:
    """Any two of the models: cosine, sign conflicts and shared entries of their deltas."""
    columns = (
        Column("models"), Column("cosine", "", None, 3), Column("sign conflict", "% of shared entries", None, 1),
        Column("shared", "% of entries", None, 1), Column("distance", "", None, 2),
    )  # fmt: skip
    rows = tuple(
        (_of(pair), pair.total.cosine, 100 * pair.total.conflicts, 100 * pair.total.shared, pair.total.distance)
        for pair in found.pairs
    )
    return Table(columns, rows)


def changes_table(found: Inspection) -> Table:
    """Each model's delta: norm, size beside the base, entries left as they were."""
    columns = (
        Column("model"), Column("delta norm", "", None, 2), Column("of the base's norm", "%", None, 2),
        Column("unchanged", "% of entries", None, 1),
    )  # fmt: skip
    rows = tuple(
        (
            change.models[0], change.total.norm,
            None if change.total.relative is None else 100 * change.total.relative, 100 * change.total.unchanged,
        )
        for change in found.changes
    )  # fmt: skip
    return Table(columns, rows)


def pictures(found: Inspection) -> list[tuple[str, str]]:
    """Captions and pictures by layer: delta norms, cosines, sign conflicts; for few pairs conflicts by role too."""
    made: list[tuple[str, str]] = []
    norms = {change.models[0]: {n: one.norm for n, one in change.layers.items()} for change in found.changes}
    made += _lines("How far each model lies from the base", norms, "norm of the delta")
    if found.pairs and found.compared == "deltas":
        cosines = {_of(pair): {n: one.cosine for n, one in pair.layers.items()} for pair in found.pairs}
        conflicts = {_of(pair): {n: 100 * one.conflicts for n, one in pair.layers.items()} for pair in found.pairs}
        made += _lines("Cosine of two deltas (0: they do not meet)", cosines, "cosine", line=0.0)
        made += _lines("Sign conflict of two deltas (50: as by chance)", conflicts, "% of shared entries", line=50.0)
        made += [picture for pair in found.pairs[:_MOST_PAIRS] for picture in _conflicts(pair)]
    return made


def _lines(
    caption: str, series: Mapping[str, Mapping[int, float | None]], label: str, line: float | None = None
) -> list[tuple[str, str]]:
    layers = sorted({layer for values in series.values() for layer in values})
    if len(layers) < 2:
        return []
    lines = {name: [values.get(layer) for layer in layers] for name, values in series.items()}
    return [(caption, plots.line_plot(layers, lines, xlabel="layer", ylabel=label, line=line))]


def _conflicts(pair: Breakdown[Pair]) -> list[tuple[str, str]]:
    """By layer and role, from tensors; entries that both change count, whatever tensor they are in."""
    measured = [
        (name, one.conflicts, round(one.shared * one.elements)) for name, one in pair.tensors.items() if one.shared
    ]
    return [
        (
            f"Sign conflict by role: {_of(pair)} ({grid.stack})",
            records.heat_map(grid, "% of shared entries", color=plots.OTHER, top=100),
        )
        for grid in records.grids(measured, lambda values: 100 * records.mean(values))
    ]


def _of(pair: Breakdown[Pair]) -> str:
    return " × ".join(pair.models)


def shown(beside: Sequence[Beside]) -> list[dict[str, Any]]:
    """What the template takes of each set of inputs."""
    told = []
    for one in beside:
        tables = [] if one.found is None else [changes_table(one.found), pairs_table(one.found)]
        told.append({
            "merges": one.merges, "missing": one.missing, "apart": one.apart,
            "compared": one.found.compared if one.found else "",
            "tables": [table for table in tables if table.rows],
            "pictures": [] if one.found is None else pictures(one.found),
        })  # fmt: skip
    return told
