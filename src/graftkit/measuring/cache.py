"""Scores of items kept between runs: by what the model is (every byte), what was asked, and what computed it.

One small JSON file per model and task. A file that cannot be read counts as absent and is written again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.checkpoints.adapters import Adapter
from graftkit.checkpoints.resolve import directory_of, open_source
from graftkit.checkpoints.sources import full_hash
from graftkit.errors import CheckpointError, DataError, OutputError
from graftkit.measuring.items import AnyItem
from graftkit.measuring.results import parsed

if TYPE_CHECKING:
    from pydantic import TypeAdapter

FORMAT = 1
_SMALL = (".json", ".txt", ".jinja", ".model", ".tiktoken", ".spm", ".py")
_OTHERS = ("graft.json", "evaluation.json", "inspection.json", "training.json")


def fingerprint(model: str, adapter_base: str | None) -> str | None:
    """A hash of every byte that a model's scores can depend on: weights, configuration, tokenizer, chat template.

    An adapter's covers its base. None where there is nothing to hash here, such as weights in pickles.
    """
    try:
        directory = directory_of(model, Path())
        source = open_source(directory)
        source.close()
    except CheckpointError:
        return None  # loading it will say why, if it does not load either
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(source, Adapter):
        base = fingerprint(adapter_base or source.base_name, None) if adapter_base or source.base_name else None
        if base is None:
            return None
        digest.update(base.encode())
    digest.update(full_hash((source.store if isinstance(source, Adapter) else source).files).encode())
    for file in sorted(directory.iterdir()):
        if file.suffix in _SMALL and file.name not in _OTHERS and file.is_file():
            digest.update(f"{file.name} {file.stat().st_size} ".encode(errors="surrogateescape") + file.read_bytes())
    return digest.hexdigest()


def key(model: str, task: str, settings: Mapping[str, Any], versions: Mapping[str, str | None]) -> str:
    """The name of a cached file: model and task by content, how it was computed, and by which versions."""
    told = {"format": FORMAT, "model": model, "task": task, "settings": dict(settings), "versions": dict(versions)}
    return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()


def load(directory: Path, name: str) -> tuple[tuple[AnyItem, ...], float] | None:
    """The items of a cached file and the seconds that they took; None where there is none that can be read."""
    try:
        held = json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))
        return parsed(_adapter(), held["items"], "cache"), float(held["seconds"])
    except (OSError, ValueError, TypeError, KeyError, DataError):
        return None


def keep(directory: Path, name: str, items: tuple[AnyItem, ...], seconds: float) -> None:
    """Writes a cached file, whole or not at all. Raises OutputError where that fails."""
    told = {"seconds": seconds, "items": [asdict(item) for item in items]}
    draft = directory / f"{name}.{os.getpid()}.part"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(told), encoding="utf-8")
        draft.replace(directory / f"{name}.json")
    except OSError as error:
        raise OutputError(f"{directory}: the cache cannot be written ({error.strerror}); use --no-cache") from error


@cache
def _adapter() -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(tuple[AnyItem, ...])
