"""`graft inspect MODEL [MODEL...]`: what models hold, and how they lie to a base and to each other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from graftkit.measuring.inspection import Breakdown, Change, Facts, Inspection, Pair, Weights
    from graftkit.measuring.subspaces import Subspaces
    from graftkit.measuring.table import Table

MEASURES = {
    "weights": (("norm", "", 3), ("entropy", "nats", 3), ("zeros", "%", 2)),
    "changes": (("norm", "", 4), ("relative", "%", 3), ("unchanged", "%", 2)),
    "pairs": (("cosine", "", 4), ("conflicts", "%", 2), ("shared", "%", 2), ("distance", "", 4), ("equal", "%", 2)),
}
"""What the tables show of each breakdown: the measure, its unit, and digits."""


def inspect(
    models: Annotated[list[str], typer.Argument(help="Checkpoints, LoRA adapters or hub ids.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="What the models were fine-tuned from: compare deltas.")] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads; all cores by default. Changes no number.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickles, with weights-only loading.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, layers too.")] = False,
) -> None:
    """Measure models: norms and entropies; with --base deltas; of several, cosines and sign conflicts.

    NaN and infinity are reported, not refused.
    """
    from graftkit.cli import console
    from graftkit.measuring.inspection import inspect as measure

    models, gates = _gates(models, tensors)
    if not models:
        console.print_json([table.to_dict() for table in gates]) if json else list(map(console.print_table, gates))
        return
    with console.progress("entries") as bar:
        found = measure(models, base, workers or os.cpu_count() or 1, bar, allow_pickle=allow_pickle)
    shared = _shared(found)
    if json:
        told = found.to_dict(tensors=tensors) | {"meaning": meaning(found)}
        told |= {"gates": [table.to_dict() for table in gates]} if gates else {}
        console.print_json(told | ({"subspaces": [pair.to_dict() for pair in shared]} if shared else {}))
        return
    for table in (*_tables(found, tensors), *_directions(shared, tensors), *gates):
        console.print_table(table)
    for line in filter(None, map(_adapter, found.models)):
        typer.echo(line)
    for note in found.notes:
        typer.echo(f"note: {note}")
    typer.echo(meaning(found))
    for pair in shared:
        typer.echo(pair.verdict)


def _gates(given: Sequence[str], tensors: bool) -> tuple[list[str], list[Table]]:
    """What of the arguments are models, and tables of the gates in the others, and of those that merges went by."""
    from pathlib import Path

    from graftkit.checkpoints.gates import is_gates, open_gates

    models = [place for place in given if not is_gates(place)]
    if len(models) == len(given) and not any((Path(place) / "graft.json").is_file() for place in models):
        return models, []
    from graftkit.checkpoints.sources import read_json
    from graftkit.reporting import gates, records

    found: list[Any] = [gates.file_table(open_gates(Path(place)), tensors) for place in given if is_gates(place)]
    merges = [Path(place) for place in models if (Path(place) / "graft.json").is_file()]
    for place in merges:
        record = records.read(read_json(place / "graft.json"), str(place))
        found.append(gates.gates_table(place.name, record, tensors))
    return models, [table for table in found if table is not None]


def _shared(found: Inspection) -> tuple[Subspaces, ...]:
    """The directions that adapters share, where there are several and nothing else."""
    if len(found.models) < 2 or any(facts.adapter is None for facts in found.models) or found.non_finite:
        return ()
    from graftkit.measuring.subspaces import subspaces

    return subspaces([facts.directory for facts in found.models], [facts.name for facts in found.models])


def _directions(shared: Sequence[Subspaces], tensors: bool) -> Iterator[Table]:
    """The table of principal angles."""
    from graftkit.measuring.table import Column, Table

    rows: list[tuple[Any, ...]] = []
    for pair in shared:
        parts = dict(pair.modules if tensors else pair.roles) | ({"total": pair.total} if pair.total else {})
        for part, o in parts.items():
            shares = (o.columns, o.chance[0], o.rows, o.chance[1], *o.inside)
            rows.append((" × ".join(pair.models), part, *(100 * value for value in shares), o.cosine))
    names = ("columns", "by chance", "rows", "by chance", "first in second", "second in first")
    columns = [Column("model"), Column("part"), *(Column(name, "%", None, 2) for name in names)]
    if rows:
        yield Table((*columns, Column("cosine", "", None, 4)), tuple(rows), "directions that adapters share")


def meaning(found: Inspection) -> str:
    """One sentence on an inspection: the most serious thing first.

    NaN or infinity anywhere. A model more than 0.5 |base| away from its base: hardly a fine-tune of it. Of several
    deltas, the pair with the largest |cosine|: below 0.1 nearly orthogonal, from 0.5 aligned, to -0.5 opposed, between
    them they overlap in part. One delta: below 0.02 |base| a light fine-tune. Of several models' weights, the pair with
    the smallest cosine: from 0.9 they are of one line. These are rules of thumb for fine-tuned language models.
    """
    if found.non_finite:
        first, count = found.non_finite[0], len(found.non_finite)
        tensors = f"{count} tensor{'s' * (count > 1)} (first {first.tensor!r} of {first.model})"
        return f"NaN or infinity in {tensors}: a merge refuses such a model"
    far = max(found.changes, key=lambda change: change.total.relative or 0.0, default=None)
    if far and (far.total.relative or 0.0) > 0.5:
        return f"{far.models[0]} lies {far.total.relative:.0%} of the base's norm away: hardly a fine-tune of this base"
    if found.pairs and found.compared == "deltas":
        return _of_deltas(max(found.pairs, key=lambda pair: abs(pair.total.cosine or 0.0)))
    if found.pairs:
        return _of_weights(min(found.pairs, key=lambda pair: pair.total.cosine or 0.0))
    return _of_change(found.changes[0].total) if found.changes else _of_one(found.models[0], found.weights[0].total)


def _of_deltas(pair: Breakdown[Pair]) -> str:
    if pair.total.cosine is None:
        return f"a delta is zero: {' and '.join(pair.models)} have nothing to compare"
    cosine, told = pair.total.cosine, _cosine(pair)
    if abs(cosine) < 0.1:
        return f"the deltas are nearly orthogonal ({told}): adding them interferes little"
    if cosine >= 0.5:
        return f"the deltas are aligned ({told}): adding them counts twice what they share, averaging does not"
    if cosine <= -0.5:
        return f"the deltas are opposed ({told}): adding them cancels what each has learnt"
    conflicts = f"{pair.total.conflicts:.0%} of the signs conflict"
    return f"the deltas overlap in part ({told}; {conflicts}): elect signs (ties), or search for weights"


def _of_weights(pair: Breakdown[Pair]) -> str:
    if pair.total.equal == 1:
        return f"{' and '.join(pair.models)} hold the same weights"
    if (pair.total.cosine or 0.0) >= 0.9:
        return f"the weights are of one line ({_cosine(pair)}): give their ancestor as --base to compare deltas"
    return f"the weights are not of one line ({_cosine(pair)}): merging them is unlikely to work"


def _cosine(pair: Breakdown[Pair]) -> str:
    return f"{' and '.join(pair.models)}: cosine {pair.total.cosine or 0.0:.3f}"


def _of_change(change: Change) -> str:
    if not change.norm:
        return "the model equals its base: the delta is zero"
    kind = "light" if (change.relative or 0.0) < 0.02 else "heavy"
    size = "of unknown relative size" if change.relative is None else f"{change.relative:.2%} of the base's norm"
    return f"a {kind} fine-tune: the delta is {size}, and {change.unchanged:.1%} of the weights are as they were"


def _of_one(facts: Facts, total: Weights) -> str:
    if facts.adapter:
        return f"every value is finite; give --base to see how far it moves {facts.adapter.base or 'its base'}"
    return f"every value is finite, and {total.zeros:.1%} of the weights are zero"


def _tables(found: Inspection, tensors: bool) -> Iterator[Table]:
    """What was found, as far as there is any of it."""
    from graftkit.measuring.table import Column, Table

    heads = [Column(name) for name in ("model", "kind", "tensors", "parameters", "size", "dtypes")]
    held = [*found.models, *([found.base] if found.base else [])]
    yield Table(tuple(heads), tuple(_facts_row(facts) for facts in held))
    titles = {"weights": "weights", "changes": "deltas to the base", "pairs": f"{found.compared} beside each other"}
    for kind, title in titles.items():
        breakdowns = getattr(found, kind)
        if breakdowns:
            columns = (
                Column("model"),
                Column("part"),
                *(Column(n, unit, None, digits) for n, unit, digits in MEASURES[kind]),
            )
            yield Table(columns, tuple(_rows(breakdowns, kind, tensors)), title)
    if found.non_finite:
        columns = tuple(map(Column, ("model", "tensor", "NaN", "infinite")))
        yield Table(columns, tuple((f.model, f.tensor, f.nan, f.infinite) for f in found.non_finite), "not finite")


def _facts_row(facts: Facts) -> tuple[str | int, ...]:
    from graftkit.cli.console import count_of, size_of

    sizes = count_of(facts.parameters), size_of(facts.bytes), ", ".join(facts.dtypes)
    return facts.name, facts.kind, facts.tensors, *sizes


def _adapter(facts: Facts) -> str:
    """How an adapter was made, in a line; empty for a checkpoint."""
    if facts.adapter is None:
        return ""
    a = facts.adapter
    ranks, scales = (", ".join(f"{value:g}" for value in values) for values in (a.ranks, a.scales))
    whole = f", and {len(a.whole_tensors)} whole tensors" * bool(a.whole_tensors)
    made = f"LoRA of rank {ranks}, scale {scales} on {a.modules} modules ({', '.join(a.targets)}){whole}"
    return f"{facts.name}: {made}; trained on {a.base or 'an unknown base'}"


def _rows(breakdowns: Sequence[Breakdown[Any]], kind: str, tensors: bool) -> Iterator[tuple[str | float | None, ...]]:
    for found in breakdowns:
        parts = (found.tensors if tensors else found.roles) | {"total": found.total}  # type: ignore[operator]
        for part, measure in parts.items():
            values = [(getattr(measure, name), unit) for name, unit, _ in MEASURES[kind]]
            numbers = (v if v is None or unit != "%" else 100 * v for v, unit in values)
            yield " × ".join(found.models), part, *numbers
