"""`graft subsample`: a representative subset of examples, after section 3.5 of the Graft paper (arXiv 2506.23940).

Each record is embedded (question and answer), the vectors are clustered by K-Means with K chosen by silhouette, and
every cluster gives its records nearest to the centroid, in balance. What the paper leaves open is said where it is
decided: the range of K in `subsample`, the balance in `subsample_choice`, the sample in `subsample_clusters`.
"""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np

from graftkit.data.layouts import Columns
from graftkit.data.places import Place, fingerprint, place_of
from graftkit.data.records import Form, Item, column_names, items
from graftkit.data.writing import write_subset
from graftkit.errors import DataError, OutputError
from graftkit.execution.record import peak_memory, versions
from graftkit.improving.subsample_choice import METHODS, Method, choose
from graftkit.improving.subsample_clusters import Clusters, cluster
from graftkit.measuring.coverage import Coverage, coverage
from graftkit.measuring.embedding import STATIC, Embedder, embedded, embedder

RANGE = (8, 64)
MEASURED = 10_000  # records, at most, that coverage is measured on
Progress = Callable[[str, int, int], None]
"""Told of a stage, how much of it is done, and how much there is."""
RECORD, ASSIGNMENT, TASK = "subsample.json", "assignment.csv", "task.yaml"


@dataclass(frozen=True)
class Records:
    """What is known of the records: their vectors `[records, dimensions]` (float16, mapped from a file without a name
    that goes when they do), topics and whether they hold
    images, and how they were read."""

    place: Place
    form: Form
    vectors: np.ndarray
    topics: tuple[str, ...]
    pictured: np.ndarray


@dataclass(frozen=True)
class Subsample:
    """A subset: where it was written, the indices (from 0) of what was `chosen` and `refused` as near duplicates, the
    clusters, and how well it and a random subset of its size cover the whole."""

    file: Path
    records: Records
    clusters: Clusters
    chosen: np.ndarray
    refused: np.ndarray
    coverage: Coverage
    at_random: Coverage
    seconds: float


def subsample(
    data: str | Path,
    out: str | Path,
    count: int,
    *,
    method: Method = "kmeans",
    clusters: tuple[int, int] = RANGE,
    embed: str = STATIC,
    duplicates: float | None = None,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    draw: Callable[[Subsample, Path], object] | None = None,
) -> Subsample:
    """Writes `count` records of `data` that stand for all of it, under the directory `out`.

    `data`: what `graftkit.data.load_task` takes, but for descriptions of tasks. `method`: `kmeans`, or `random`,
    `kcenter`, `herding` to compare with. `clusters`: the least and the most clusters; K is chosen between them by
    silhouette (of few clusters a subset of those near the centroids covers less than a random one, so the range begins
    at 8). `embed`: `wordllama`, or a model for sentence-transformers. `duplicates`: records whose cosine with a chosen
    one is this or more are passed over. `columns`: ours to theirs. Writes the subset in the format of `data`, a
    description that loads it (`task.yaml`), each record's cluster (`assignment.csv`) and a record (`subsample.json`);
    `draw` may add pictures to the directory, which stands under its name when all is there.

    Raises DataError for data that cannot be read and for fewer records than `count`, OutputError where `out` exists.
    """
    started, place, out = time.perf_counter(), place_of(data), Path(out)
    _check(count, method, clusters, duplicates, seed, out)
    by = embedder(embed)
    try:
        with TemporaryFile(dir=next(folder for folder in out.absolute().parents if folder.is_dir())) as held:
            records = _read(place, Columns(column_names("columns", columns or {})), by, held, progress)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror})") from error
    total = len(records.vectors)
    if count > total:
        raise DataError(f"{place.name}: expected at most as many as there are records, {total}, got {count}")
    grouped = cluster(records.vectors, *clusters, seed)
    chosen, refused = choose(records.vectors, grouped, count, method, duplicates, seed)
    others, _ = choose(records.vectors, grouped, len(chosen), "random", None, seed)
    covered, at_random = (_coverage(records, own, seed) for own in (chosen, others))
    made = Subsample(out, records, grouped, chosen, refused, covered, at_random, time.perf_counter() - started)
    settings = {"count": count, "method": method, "clusters": list(clusters), "duplicates": duplicates, "seed": seed}
    return _write(made, by, settings, draw or (lambda made, directory: None))


def _check(count: int, method: str, clusters: tuple[int, int], duplicates: float | None, seed: int, out: Path) -> None:
    if count < 1:
        raise DataError(f"expected at least 1 record to choose, got {count}")
    if method not in METHODS:
        raise DataError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if not 1 <= clusters[0] <= clusters[1]:
        raise DataError(f"clusters: expected a number or a range such as 8-64, got {clusters[0]}-{clusters[1]}")
    if duplicates is not None and not 0 < duplicates <= 1:
        raise DataError(f"duplicates: expected a cosine above 0 and at most 1, got {duplicates}")
    if not 0 <= seed < 1 << 32:
        raise DataError(f"seed: expected a number from 0 to {(1 << 32) - 1}, got {seed}")
    if out.exists():
        raise OutputError(f"{out}: exists already; choose another name")


def _read(place: Place, columns: Columns, by: Embedder, held: IO[bytes], progress: Progress | None) -> Records:
    """Reads and embeds, a batch at a time: of each record only the vector stays, in the file `held`, and its topic."""
    topics: list[str] = []
    pictured, names = bytearray(), dict[str, str]()
    form, done = Form("", "", columns), 0
    size = place.path.stat().st_size if place.path is not None and place.path.is_file() else 0

    def texts() -> Iterator[str]:
        nonlocal form, done
        for each, record, item in items(place, "", columns):
            form, done = each, done + len(record.raw)
            topics.append(names.setdefault(item.subtask, item.subtask))  # the same text is held once
            pictured.append(bool(item.images))
            yield text_of(item)

    width = 0
    for part in embedded(texts(), by):
        held.write(part.tobytes())
        width = part.shape[1]
        if progress is not None:
            progress("embedding", *((min(done, size), size) if done else (len(topics), len(topics))))
    held.flush()
    vectors = np.memmap(held, np.float16, "r", shape=(len(topics), width))
    return Records(place, form, vectors, tuple(topics), np.frombuffer(pictured, bool))


def text_of(item: Item) -> str:
    """What is embedded of an item: everything said before the answer, and the right answer, in lines of their own."""
    said = [*(text for _, text in item.before), item.prompt, *item.choices[item.answer : item.answer + 1]]
    return "\n".join(text for text in said if text)


def _coverage(records: Records, chosen: np.ndarray, seed: int) -> Coverage:
    """On the chosen and at most 10,000 records drawn by the seed."""
    total = len(records.vectors)
    drawn = np.random.default_rng(seed + 1).permutation(total)[:MEASURED]
    rows = np.union1d(drawn, chosen)
    topics = [records.topics[row] for row in rows]
    return coverage(records.vectors[rows], np.searchsorted(rows, chosen), topics)


def _write(
    made: Subsample, by: Embedder, settings: dict[str, Any], draw: Callable[[Subsample, Path], object]
) -> Subsample:
    """Writes everything beside the final name, and renames it when it is complete."""
    out, draft = made.file, made.file.with_name(f".{made.file.name}.graft-subsample")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        written = write_subset(made.records.place, made.chosen.tolist(), draft)
        _write_assignment(draft / ASSIGNMENT, made)
        (draft / TASK).write_text(_description(made.records, written.name, out), encoding="utf-8")
        told = json.dumps(_told(made, by, settings), indent=1, ensure_ascii=False)
        (draft / RECORD).write_text(told + "\n", encoding="utf-8")
        draw(made, draft)
        draft.rename(out)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return replace(made, file=out / written.name)


def _write_assignment(path: Path, made: Subsample) -> None:
    state = np.zeros(len(made.records.vectors), np.int8)
    state[made.chosen], state[made.refused] = 1, 2
    names = ("", "chosen", "near duplicate")
    with path.open("w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(("record", "cluster", "distance", "state"))
        found = zip(made.clusters.labels, made.clusters.distances, state, strict=True)
        rows.writerows((n, int(k), f"{d:.5f}", names[s]) for n, (k, d, s) in enumerate(found, start=1))


def _description(records: Records, file: str, out: Path) -> str:
    """A task's description of the subset; its images stay where they are."""
    import yaml

    told: dict[str, Any] = {"kind": records.form.kind, "data": file, "chat": records.form.chat}
    if records.form.columns.names:
        told["columns"] = dict(records.form.columns.names)
    if records.pictured.any() and records.place.directory is not None:
        told["images"] = str(records.place.directory.resolve())
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=True)


def _told(made: Subsample, by: Embedder, settings: dict[str, Any]) -> dict[str, Any]:
    records, clusters = made.records, made.clusters
    sizes = np.bincount(clusters.labels, minlength=len(clusters.centroids))
    taken = np.bincount(clusters.labels[made.chosen], minlength=len(clusters.centroids))
    return {
        "format": 1,
        "data": {
            "place": records.place.name, "sha256": fingerprint(records.place), "records": len(records.vectors),
            "kind": records.form.kind, "layout": records.form.layout, "columns": dict(records.form.columns.names),
        },
        "settings": settings,
        "embedder": {"name": by.name, "version": by.version, "sha256": by.fingerprint,
                     "dimensions": records.vectors.shape[1]},
        "clusters": {
            "count": len(clusters.centroids), "silhouettes": clusters.silhouettes, "silhouettes_on": clusters.sample,
            "fit": clusters.fit, "sizes": sizes.tolist(), "chosen": taken.tolist(),
        },
        "chosen": len(made.chosen), "near_duplicates": len(made.refused),
        "coverage": {"subset": asdict(made.coverage), "random": asdict(made.at_random),
                     "measured_on": min(MEASURED, len(records.vectors))},
        "versions": versions() | {"scikit-learn": metadata.version("scikit-learn")},
        "seconds": round(made.seconds, 3), "peak_memory_bytes": peak_memory(),
    }  # fmt: skip
