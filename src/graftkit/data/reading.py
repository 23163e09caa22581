"""Records from any place, one at a time: never more than one record, or one batch of Parquet's rows, is in memory."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from graftkit.data.json_lists import json_list
from graftkit.data.places import Place, data_set
from graftkit.errors import DataError, missing_extra

LARGEST = 64 << 20  # bytes of a line, or characters of a record in a list
BATCH = 1024  # rows of Parquet at once


class Record(NamedTuple):
    """One record: where it stands, its fields, and its text as it stands in the file (where it is text)."""

    where: str
    fields: dict[str, Any]
    raw: str = ""


def read(place: Place, wanted: Collection[str] = ()) -> Iterator[Record]:
    """Every record of a place, in order; of Parquet only the `wanted` columns, where any of them are there.

    Raises DataError with file and line (or row) for what cannot be read, and where there are no records.
    """
    found = False
    for record in _records(place, wanted):
        found = True
        yield record
    if not found:
        raise DataError(f"{place.name}: no records")


def _records(place: Place, wanted: Collection[str]) -> Iterator[Record]:
    if place.path is None or not place.ending:
        return _rows(place)
    if place.ending == ".parquet":
        return _parquet(place.path, wanted)
    return _READERS[place.ending](place.path)


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers from 1 and their ends. Only a line feed ends one: texts in JSON may
    hold other separators, such as U+2028, as they are."""
    with opened(path) as stream:
        number = 0
        while raw := stream.readline(LARGEST + 1):
            number += 1
            if len(raw) > LARGEST:
                raise DataError(f"{path}:{number}: a line of more than {LARGEST >> 20} MB; expected a record a line")
            yield number, _text(f"{path}:{number}", raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw)


def _text(where: str, raw: bytes) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start} of the line); convert the file to UTF-8") from error
    if "\0" in text:
        raise DataError(f"{where}: a NUL byte (byte {raw.index(0)} of the line): the file is in UTF-16, or was not "
                        "written to its end; convert or mend it")  # fmt: skip
    return text


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked where it ends in `.gz`. Raises DataError where they cannot be read."""
    try:
        with path.open("rb") as plain:
            yield cast(IO[bytes], gzip.GzipFile(fileobj=plain)) if path.suffix == ".gz" else plain
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _json_lines(path: Path) -> Iterator[Record]:
    for number, line in numbered_lines(path):
        if line.strip():
            where = f"{path}:{number}"
            yield Record(where, as_object(where, line), line)


def _json(path: Path) -> Iterator[Record]:
    """A list of records; or, as many files of this ending hold, one record a line."""
    if not is_list(path):
        yield from _json_lines(path)
        return
    try:
        with opened(path) as stream, io.TextIOWrapper(cast(Any, stream), "utf-8-sig", newline="") as text:
            for where, value, raw in json_list(path, text, LARGEST):
                yield Record(where, _is_object(where, value, raw), raw)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{_line_not_utf8(path)}: not UTF-8; convert the file to UTF-8") from error


def _line_not_utf8(path: Path) -> int:
    """The first line of a file that is not UTF-8, however long its lines are."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with opened(path) as stream:
        try:
            while chunk := stream.read(1 << 18):
                line += decoder.decode(chunk).count("\n")
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
    return line


def is_list(path: Path) -> bool:
    """Whether a file of JSON holds a list, not one record a line."""
    with opened(path) as stream:
        head = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    return bool(head) and head[:1] != b"{"


def as_object(where: str, text: str) -> dict[str, Any]:
    """One record in JSON."""
    try:
        value = json.loads(text.rstrip())
    except (ValueError, RecursionError) as error:  # numbers too long to convert are a ValueError, too
        reason = f"{error.msg} (character {error.pos + 1})" if isinstance(error, json.JSONDecodeError) else error
        whole = "; expected a list [...] of records, or a record a line" * (text.strip() in ("{", "}"))
        raise DataError(f"{where}: not JSON: {reason}{whole}") from error
    return _is_object(where, value, text)


def _is_object(where: str, value: Any, raw: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object with fields such as prompt and answer, got {value!r:.40}")
    if "\\ud" in raw or "\\uD" in raw:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise DataError(
                f"{where}: {half} is half of a surrogate pair, which is no text; mend the record"
            ) from error
    return value


def _plain(path: Path) -> Iterator[Record]:
    for number, line in numbered_lines(path):
        if line.strip():
            yield Record(f"{path}:{number}", {"text": line.rstrip("\r\n")}, line)


def _separated(delimiter: str) -> Callable[[Path], Iterator[Record]]:
    def rows(path: Path) -> Iterator[Record]:
        csv.field_size_limit(LARGEST)
        taken: list[tuple[int, str]] = []

        def lines() -> Iterator[str]:
            for number, line in numbered_lines(path):
                taken.append((number, line))
                yield line

        reader = csv.reader(lines(), delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            taken.clear()
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{path}:{taken[0][0] if taken else 1}: not CSV: {error}") from error
            if row is None:
                return
            where, raw = f"{path}:{taken[0][0]}", "".join(line for _, line in taken)
            if not header:
                header = _header(where, row)
            elif row:
                yield Record(where, _row(where, header, row), raw)

    return rows


def _header(where: str, row: list[str]) -> list[str]:
    twice = next((name for name in row if row.count(name) > 1), None)
    if twice is not None or not all(row):
        unnamed = f"column {row.index('') + 1 if '' in row else 0} has no name (pandas: to_csv(..., index=False))"
        problem = f"two columns are called {twice!r}" if twice else unnamed
        raise DataError(f"{where}: {problem}; the first line names the columns")
    return row


def _row(where: str, header: list[str], row: list[str]) -> dict[str, Any]:
    if len(row) != len(header):
        raise DataError(f"{where}: expected {len(header)} values ({', '.join(header):.80}), got {len(row)}")
    return dict(zip(header, row, strict=True))


def _parquet(path: Path, wanted: Collection[str]) -> Iterator[Record]:
    number = 0
    with parquet(path) as file:
        names = file.schema_arrow.names
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{path}: two columns are called {twice!r}; give each its own name")
        here = [name for name in names if name in wanted]
        for batch in file.iter_batches(BATCH, columns=here or None):
            for fields in _fields(path, number, batch):
                number += 1
                yield Record(f"{path}: row {number}", fields)


def _fields(path: Path, before: int, batch: Any) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError as error:
        for row in range(batch.num_rows):
            try:
                batch.slice(row, 1).to_pylist()
            except UnicodeDecodeError:
                raise DataError(f"{path}: row {before + row + 1}: not UTF-8 ({error.reason})") from error
        raise


@contextmanager
def parquet(path: Path) -> Iterator[Any]:
    """A Parquet file, opened. Raises GraftError without the extra `data`, DataError for what is no such file."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise missing_extra("data", "pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({error!s:.200})") from error


def _rows(place: Place) -> Iterator[Record]:
    for number, fields in enumerate(data_set(place), start=1):
        yield Record(f"{place.name}: row {number}", fields)


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".txt": _plain,
    ".csv": _separated(","), ".tsv": _separated("\t"),
}  # fmt: skip
