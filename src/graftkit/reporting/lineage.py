"""Where a merge comes from: its inputs, and the inputs of those that are merges themselves, as far as records go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from graftkit.checkpoints.sources import read_json
from graftkit.errors import CheckpointError, DataError
from graftkit.reporting import records
from graftkit.reporting.records import InputFacts, Record

RECORD = "graft.json"


@dataclass(frozen=True)
class Ancestor:
    """An input of a merge; with `recipe` and ancestors of its own where it was merged too."""

    role: str
    source: str
    kind: str
    fingerprint: str
    recipe: str = ""
    note: str = ""
    ancestors: tuple[Ancestor, ...] = ()

    @property
    def merged(self) -> bool:
        """Whether it is the result of a merge."""
        return bool(self.recipe or self.note)


def lineage(record: Record, seen: frozenset[str] = frozenset()) -> tuple[Ancestor, ...]:
    """The inputs of a merge, and what their own records tell, as deep as records are found."""
    return tuple(_ancestor(one, seen) for one in record.inputs)


def is_nested(ancestors: tuple[Ancestor, ...]) -> bool:
    """Whether any of them was merged itself."""
    return any(one.merged for one in ancestors)


def _ancestor(one: InputFacts, seen: frozenset[str]) -> Ancestor:
    told = (one.role, one.source, one.kind, one.fingerprint)
    file = Path(one.directory) / RECORD
    if one.directory in seen or not one.directory or not file.is_file():
        gone = "a recipe; its result has been cleared from the cache, and its record with it"
        return Ancestor(*told, note=gone if one.kind == "recipe" else "")
    try:
        record = records.read(read_json(file), str(file))
    except (CheckpointError, DataError) as error:
        return Ancestor(*told, note=str(error))
    deeper = lineage(record, seen | {one.directory})
    return Ancestor(*told, recipe=record.recipe_yaml, ancestors=deeper)
