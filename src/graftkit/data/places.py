"""Where records lie: a file, a directory that `datasets` reads, or a data set of the hub; and what it holds, hashed."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftkit.errors import DataError, missing_extra, unknown

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
"""Files that can be read; all but Parquet may end in `.gz` besides."""

_HUB = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?(:[\w.-]+)?")
_SAVED = ("dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Place:
    """A place of records: `path` is None for a data set of the hub, which goes by `name` (and revision, subset)."""

    name: str
    path: Path | None = None
    split: str = ""

    @property
    def ending(self) -> str:
        """What kind of file it is, without `.gz`; empty where `datasets` reads it."""
        if self.path is None or self.path.is_dir():
            return ""
        named = self.path.name.removesuffix(".gz")
        return Path(named).suffix

    @property
    def directory(self) -> Path | None:
        """What paths in its records are relative to; None on the hub."""
        return self.path if self.path is None or self.path.is_dir() else self.path.parent


def place_of(name: str | Path, relative_to: Path | None = None) -> Place:
    """The place that a name means: a file, a directory with an optional `#split`, or `owner/name[@revision][:subset]`
    of the hub with an optional `#split`; paths are looked up in `relative_to` (default: the working directory).

    Raises DataError where there is no such thing, or where it is a file of a kind that cannot be read.
    """
    told = str(name)
    path = (relative_to or Path()) / _expanded(told)
    if _is(path, "is_file"):
        return _file(path)
    bare, _, split = told.rpartition("#") if "#" in told else (told, "", "")
    directory = (relative_to or Path()) / _expanded(bare)
    if _is(directory, "is_dir"):
        return Place(bare, directory, split)
    looks_like_a_file = Path(bare.removesuffix(".gz")).suffix in (*ENDINGS, ".yaml", ".yml")
    if _HUB.fullmatch(bare) and not bare.startswith(".") and not looks_like_a_file:
        return Place(bare, None, split)
    raise DataError(f"{path}: does not exist; expected a file in {', '.join(ENDINGS)}, a directory that `datasets` "
                    "saved, or OWNER/NAME of a data set on the hub")  # fmt: skip


def _expanded(told: str) -> Path:
    try:
        return Path(told).expanduser()
    except RuntimeError:  # `~name` of nobody here
        return Path(told)


def _is(path: Path, question: str) -> bool:
    try:
        return bool(getattr(path, question)())
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def _file(path: Path) -> Place:
    place = Place(str(path), path)
    packed = path.name.endswith(".gz")
    if place.ending not in ENDINGS or (packed and place.ending == ".parquet"):
        got = "".join(path.suffixes[-2:]) if packed else path.suffix
        raise DataError(f"{path}: expected records in {', '.join(ENDINGS)}, got {got!r}")
    return place


def fingerprint(place: Place) -> str:
    """SHA-256 of a file's bytes, of a data set's rows as JSON; of everything, never of a sample."""
    if place.path is None or place.path.is_dir():
        digest = hashlib.sha256()
        for row in data_set(place):
            digest.update(json.dumps(row, sort_keys=True, default=repr).encode(errors="surrogatepass") + b"\n")
        return digest.hexdigest()
    try:
        with place.path.open("rb") as stream:
            digest = hashlib.sha256()
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{place.path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def data_set(place: Place) -> Any:
    """The rows of one split, as `datasets` gives them: mapped from disk, not held in memory.

    With `HF_HUB_OFFLINE=1` the local cache serves the hub. Images stay as they are stored. Raises DataError.
    """
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("datasets", "datasets") from error
    datasets.disable_progress_bars()
    try:
        found = _loaded(datasets, place)
    except (OSError, ValueError, RuntimeError, IndexError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{place.name}: `datasets` does not load it ({_reason(error):.300})") from error
    for name, feature in found.features.items():
        if isinstance(feature, (datasets.Image, datasets.Audio)):
            found = found.cast_column(name, type(feature)(decode=False))
    return found


def _reason(error: BaseException) -> str:
    """What it says, and what lies behind it, each in a line: the row stands in the last."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    behind = error.__cause__ or error.__context__
    return first if behind is None or behind is error else "; ".join(dict.fromkeys([first, _reason(behind)]))


def _loaded(datasets: Any, place: Place) -> Any:
    if place.path is not None and any((place.path / name).exists() for name in _SAVED):
        found = datasets.load_from_disk(str(place.path))
    else:
        bare, _, subset = place.name.partition(":") if place.path is None else (str(place.path), "", "")
        name, _, revision = bare.partition("@") if place.path is None else (bare, "", "")
        split = {"split": place.split} if place.split else {}
        found = datasets.load_dataset(name, subset or None, revision=revision or None, **split)
    if not isinstance(found, datasets.DatasetDict):
        return found
    if place.split and place.split not in found:
        raise DataError(f"{place.name}: {unknown('split', place.split, found)}")
    if not place.split and len(found) != 1:
        raise DataError(
            f"{place.name}: several splits ({', '.join(found)}); name one: {place.name}#{next(iter(found))}"
        )
    return found[place.split or next(iter(found))]
