"""Some of a place's records, in the place's own format: the same bytes where it is text, the same schema where not."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, cast

from graftkit.data.places import Place, data_set
from graftkit.data.reading import BATCH, is_list, numbered_lines, parquet, read
from graftkit.errors import OutputError


def write_subset(place: Place, chosen: list[int], directory: Path, stem: str = "subset") -> Path:
    """Writes the records at the indices `chosen` (from 0, ascending) under `directory`, in their order.

    Lines of text and of CSV are copied as they stand, elements of a JSON list too; Parquet keeps its schema; a data set
    is saved by `datasets`. Raises OutputError where it cannot be written.
    """
    packed = ".gz" if place.path is not None and place.ending and place.path.suffix == ".gz" else ""
    out = directory / f"{stem}{place.ending}{packed}"
    try:
        if not place.ending:
            data_set(place).select(chosen).save_to_disk(str(out))
        elif place.ending == ".parquet":
            _parquet(cast(Path, place.path), frozenset(chosen), out)
        else:
            with _opened(out) as stream:
                for text in _texts(place, frozenset(chosen)):
                    stream.write(text.encode())
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror})") from error
    return out


@contextmanager
def _opened(out: Path) -> Iterator[IO[bytes]]:
    with out.open("wb") as stream:
        if out.suffix != ".gz":
            yield stream
            return
        with gzip.GzipFile("", "wb", fileobj=stream, mtime=0) as packed:  # same records, same bytes: no time, no name
            yield cast(IO[bytes], packed)


def _texts(place: Place, chosen: frozenset[int]) -> Iterator[str]:
    path = cast(Path, place.path)
    kept = (record.raw for number, record in enumerate(read(place)) if number in chosen)
    if place.ending in (".csv", ".tsv"):
        yield _header(place, path)
    if place.ending == ".json" and is_list(path):
        yield "[\n"
        for number, raw in enumerate(kept):
            yield (",\n" if number else "") + raw
        yield "\n]\n"
        return
    for raw in kept:
        yield raw if raw.endswith("\n") else raw + "\n"


def _header(place: Place, path: Path) -> str:
    """The lines before the first record: those that name the columns."""
    first = int(next(iter(read(place))).where.rpartition(":")[2])
    return "".join(line for _, line in islice(numbered_lines(path), first - 1))


def _parquet(path: Path, chosen: frozenset[int], out: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with parquet(path) as file, pq.ParquetWriter(out, file.schema_arrow) as writer:
        start = 0
        for batch in file.iter_batches(BATCH):
            rows = [number - start for number in range(start, start + batch.num_rows) if number in chosen]
            if rows:
                writer.write_batch(batch.take(pa.array(rows)))
            start += batch.num_rows
