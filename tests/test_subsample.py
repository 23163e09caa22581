"""Representative subsets: embedding, clusters, what is chosen of them, and what is written."""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.util
import json
import sys
import tracemalloc
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import graftkit
from graftkit.cli import app
from graftkit.data import load_task
from graftkit.data.layouts import Columns
from graftkit.data.places import place_of
from graftkit.errors import DataError, GraftError, OutputError
from graftkit.improving import subsample_clusters
from graftkit.improving.subsample import _read
from graftkit.improving.subsample_choice import METHODS, choose
from graftkit.improving.subsample_clusters import Clusters, candidates, cluster, silhouettes
from graftkit.measuring.coverage import coverage
from graftkit.measuring.embedding import embedded, embedder
from graftkit.reporting import landscape

pytest.importorskip("sklearn")
if importlib.util.find_spec("wordllama") is None:  # found, never imported: that is what is tested below
    pytest.skip("needs wordllama", allow_module_level=True)


def points(count: int, seed: int = 0, groups: int = 4) -> np.ndarray:
    """Unit vectors in groups of very different sizes."""
    source = np.random.default_rng(seed)
    of = np.minimum(source.geometric(0.5, count) - 1, groups - 1)
    rows = 3 * np.eye(groups, 8)[of] + source.normal(size=(count, 8)) * 0.4
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def grouped(labels: list[int], distances: list[float]) -> Clusters:
    count = max(labels) + 1
    return Clusters(np.array(labels), np.array(distances), np.zeros((count, 8)), {}, len(labels), "")


# Clusters


@pytest.mark.parametrize("count", [1, 5, 130, 700])
def test_silhouettes_are_those_of_scikit_learn(count: int) -> None:
    from sklearn.metrics import silhouette_score

    vectors = points(count + 6).astype(np.float32)
    labelings = [np.arange(len(vectors)) % k for k in (2, 3, 5)]
    labelings.append(np.minimum(np.arange(len(vectors)), 2))  # two that stand alone
    expected = [silhouette_score(vectors.astype(np.float64), labels) for labels in labelings]
    assert silhouettes(vectors, labelings) == pytest.approx(expected, abs=1e-4)


def test_clusters_that_are_there_are_found() -> None:
    source = np.random.default_rng(1)
    labels = np.repeat(np.arange(6), [5, 20, 80, 7, 40, 30])
    vectors = (np.eye(6, 16)[labels] * 5 + source.normal(size=(len(labels), 16)) * 0.1).astype(np.float16)
    found = cluster(vectors, 2, 12, seed=3)
    assert len(found.centroids) == 6 and set(found.silhouettes) == set(candidates(2, 12))
    assert len({(one, int(other)) for one, other in zip(labels, found.labels, strict=True)}) == 6
    expected = np.linalg.norm(vectors.astype(np.float32) - found.centroids[found.labels], axis=1)
    assert found.distances == pytest.approx(expected, abs=1e-2)


def test_many_records_are_clustered_in_mini_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subsample_clusters, "SAMPLE", 60)
    vectors = points(400)
    found = cluster(vectors, 2, 6, seed=0)
    assert (found.sample, found.fit[:12], len(found.labels)) == (60, "mini-batches", 400)
    squares = ((vectors.astype(np.float64)[:, None] - found.centroids) ** 2).sum(axis=2)
    assert (squares[np.arange(400), found.labels] <= squares.min(axis=1) + 1e-3).all()


def test_a_cluster_for_each_record_is_not_judged_and_not_started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subsample_clusters, "MANY", 20)
    vectors = points(90)
    assert not cluster(vectors, 30, 30, seed=0).silhouettes and len(cluster(vectors, 15, 15, seed=0).silhouettes) == 1
    found = cluster(vectors, 30, 30, seed=0)
    chosen, _ = choose(vectors, found, 30, "kmeans", None, 0)
    assert len(found.centroids) == 30 and set(found.labels[chosen]) == set(range(30))


def test_the_numbers_tried_reach_from_end_to_end() -> None:
    assert candidates(3, 3) == [3] and candidates(2, 5) == [2, 3, 4, 5]
    tried = candidates(8, 64)
    assert tried[0] == 8 and tried[-1] == 64 and len(tried) <= 12 and tried == sorted(set(tried))


@pytest.mark.parametrize("vectors", [points(1), np.repeat(points(1), 9, axis=0), points(2)])
def test_records_that_do_not_differ_are_one_cluster(vectors: np.ndarray) -> None:
    found = cluster(vectors, 2, 8, seed=0)
    assert len(found.centroids) == 1 and not found.silhouettes and not found.labels.any()


# Choice


def test_two_kinds_of_equal_records_are_two_clusters() -> None:
    vectors = np.repeat(np.eye(2, 8, dtype=np.float16), 6, axis=0)
    found = cluster(vectors, 8, 64, 0)
    assert len(found.centroids) == 2 and found.silhouettes == {2: 1.0}
    assert np.bincount(found.labels[choose(vectors, found, 4, "kmeans", None, 0)[0]]).tolist() == [2, 2]


def test_clusters_give_in_turn_the_nearest_first() -> None:
    clusters = grouped([0, 0, 0, 1, 1, 1, 1, 2], [0.3, 0.1, 0.2, 0.4, 0.1, 0.1, 0.2, 0.9])
    take = lambda count: choose(points(8), clusters, count, "kmeans", None, 0)[0].tolist()  # noqa: E731
    assert take(1) == [4]  # the largest cluster begins; of equal distances the first record
    assert take(3) == [1, 4, 7]
    assert take(5) == [1, 2, 4, 5, 7]  # the third cluster has run dry
    assert take(7) == [0, 1, 2, 4, 5, 6, 7]
    assert take(8) == list(range(8))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(0, 9), st.data())
def test_shares_differ_by_one_unless_a_cluster_ran_dry(count: int, seed: int, data: st.DataObject) -> None:
    source = np.random.default_rng(seed)
    labels = np.unique(source.integers(0, 6, 60) ** 2 // 6, return_inverse=True)[1]
    clusters = grouped(labels.tolist(), source.random(60).tolist())
    chosen, refused = choose(points(60, seed), clusters, count, "kmeans", None, seed)
    sizes, given = (np.bincount(own, minlength=labels.max() + 1) for own in (labels, labels[chosen]))
    assert len(chosen) == count and len(refused) == 0
    assert all(given.max() - taken <= 1 or taken == size for taken, size in zip(given, sizes, strict=True))
    for k in range(len(sizes)):  # what was left is no nearer than what was taken
        own = np.flatnonzero(labels == k)
        left = np.setdiff1d(own, chosen)
        if len(left) and given[k]:
            assert clusters.distances[left].min() >= clusters.distances[np.intersect1d(own, chosen)].max()


@pytest.mark.parametrize("method", METHODS)
def test_near_duplicates_are_passed_over(method: Any) -> None:
    vectors = np.concatenate([points(40), points(40)])
    clusters = cluster(vectors, 2, 6, seed=0)
    chosen, refused = choose(vectors, clusters, 40, method, 0.97, seed=0)
    rows = vectors[chosen].astype(np.float32)
    cosines = rows @ rows.T - 2 * np.eye(len(rows))
    assert cosines.max() < 0.97 and not set(chosen) & set(refused)
    every, _ = choose(vectors, clusters, 80, method, None, seed=0)
    assert every.tolist() == list(range(80))
    some, left = choose(vectors, clusters, 80, method, 0.97, seed=0)
    assert len(some) + len(left) == 80 and len(some) <= 40  # nothing else is left


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_chooses_the_same(method: Any) -> None:
    vectors = points(90)
    runs = [choose(vectors, cluster(vectors, 2, 9, seed), 20, method, None, seed)[0].tolist() for seed in (1, 1, 2)]
    assert runs[0] == runs[1] and len(set(runs[0])) == 20
    assert method != "random" or runs[0] != runs[2]


def test_k_center_takes_the_farthest_and_herding_keeps_the_mean() -> None:
    vectors = points(120)
    clusters, exact = cluster(vectors, 2, 6, 0), vectors.astype(np.float64)
    chosen = {method: choose(vectors, clusters, 15, method, None, 0)[0] for method in METHODS}
    gaps = {m: (1 - exact @ exact[own].T).min(axis=1).max() for m, own in chosen.items()}
    off = {m: np.linalg.norm(exact.mean(axis=0) - exact[own].mean(axis=0)) for m, own in chosen.items()}
    assert gaps["kcenter"] == min(gaps.values()) and off["herding"] == min(off.values())
    two = choose(vectors, clusters, 2, "kcenter", None, 0)[0]
    first = int((exact @ exact.mean(axis=0)).argmax())
    assert set(two) == {first, int((exact @ exact[first]).argmin())}


def test_coverage_is_what_it_says() -> None:
    vectors = np.eye(4, dtype=np.float16)[[0, 0, 1, 2]]
    found = coverage(vectors, np.array([0, 2]), ["a", "a", "b", "c"])
    assert (found.distance, found.topics) == (0.25, 2 / 3)
    assert found.balance == pytest.approx(np.log(2) / np.log(3)) and found.farthest == pytest.approx(0.85)
    assert coverage(vectors, np.arange(4), [""] * 4).balance == 1


# Embedding


def test_static_vectors_are_means_of_tokens() -> None:
    by = embedder()
    texts = [
        "The cat sat on the mat.",
        "",
        "A cat is sitting on a mat.",
        "Hypertension is a disease.",
        "x" * 9999,
        "\ud800",
    ]
    (found,) = embedded(texts, by)
    assert found.shape == (6, 256) and found.dtype == np.float16
    assert np.linalg.norm(found.astype(np.float32), axis=1) == pytest.approx([1, 0, 1, 1, 1, 1], abs=1e-3)
    assert found[0] @ found[2] > 0.5 > found[0] @ found[3]
    ids = by.tokenizer.encode(texts[0], add_special_tokens=False).ids  # type: ignore[attr-defined]
    mean = by.weights[ids].mean(axis=0)  # type: ignore[attr-defined]
    assert found[0].astype(np.float32) == pytest.approx(mean / np.linalg.norm(mean), abs=1e-3)
    assert len(by.fingerprint) == 64 and "wordllama" not in sys.modules
    assert found[4] == pytest.approx(next(embedded(["x" * 4096], by))[0])


def test_other_embedders_come_from_sentence_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        def __init__(self, name: str) -> None:
            if name == "absent":
                raise OSError("no such model\nmore")

        def encode(self, texts: list[str], show_progress_bar: bool) -> np.ndarray:
            return np.array([[3.0, 4.0 * len(text)] for text in texts])

    module = types.SimpleNamespace(SentenceTransformer=Model, __version__="9")
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    by = embedder("some/model")
    assert next(embedded(["a"], by)) == pytest.approx(np.array([[0.6, 0.8]]), abs=1e-3)
    assert (by.name, by.version) == ("some/model", "9")
    with pytest.raises(DataError, match=r"--embedder absent: .*\(no such model\)"):
        embedder("absent")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(GraftError, match=r"graftkit\[embed\]"):
        embedder("some/model")


def test_without_its_package_the_static_embedder_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GraftError, match=r"graftkit\[data\]"):
        embedder()


# The whole


ROWS = [
    {"question": f'{text} {n}?\n"so", then', "solution": f"answer {n}", "subtask": text, "more": n}
    for n in range(10)
    for text in ("How many apples", "Which disease", "Translate to French", "Write a function")
]
COLUMNS = {"prompt": "question", "answer": "solution"}


def data_file(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    ending = path.name.removesuffix(".gz").rpartition(".")[2]
    if ending == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    elif ending in ("csv", "tsv"):
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="," if ending == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = json.dumps(rows, indent=2) if ending == "json" else "".join(json.dumps(row) + "\r\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    from graftkit.data.places import place_of
    from graftkit.data.reading import read

    return [record.fields for record in read(place_of(path))]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.tsv", "d.parquet", "d.jsonl.gz", "d.json.gz"])
def test_a_subset_keeps_the_format_the_fields_and_the_order(tmp_path: Path, name: str) -> None:
    data, out = data_file(tmp_path / name), tmp_path / "out"
    made = graftkit.subsample(data, out, 9, clusters=(2, 6), columns=COLUMNS)
    assert made.file == out / f"subset.{name.partition('.')[2]}"
    whole = rows_of(data)
    assert rows_of(made.file) == [whole[index] for index in made.chosen] and len(made.chosen) == 9
    task = load_task(out / "task.yaml")
    assert [item.prompt for item in task.items] == [ROWS[index]["question"] for index in made.chosen]
    again = graftkit.subsample(data, tmp_path / "again", 9, clusters=(2, 6), columns=COLUMNS)
    assert again.file.read_bytes() == made.file.read_bytes()
    assert (tmp_path / "again/assignment.csv").read_bytes() == (out / "assignment.csv").read_bytes()


def test_lines_are_copied_as_they_stand(tmp_path: Path) -> None:
    data = data_file(tmp_path / "d.csv")
    made = graftkit.subsample(data, tmp_path / "out", 40, columns=COLUMNS)
    assert made.file.read_bytes() == data.read_bytes()
    (tmp_path / "t.txt").write_bytes("eins\r\n\r\nzwei\nü".encode())
    assert (
        graftkit.subsample(tmp_path / "t.txt", tmp_path / "texts", 3).file.read_bytes() == "eins\r\nzwei\nü\n".encode()
    )


def test_a_schema_stays(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table({"text": pa.array(["a b", "c d", "e f"], pa.large_string()), "n": pa.array([1, 2, 3], pa.int16())})
    pq.write_table(table, tmp_path / "d.parquet")
    made = graftkit.subsample(tmp_path / "d.parquet", tmp_path / "out", 2)
    assert pq.read_table(made.file).schema == table.schema


def test_data_sets_stay_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    made = graftkit.subsample(tmp_path / "saved", tmp_path / "out", 6, columns=COLUMNS)
    assert datasets.load_from_disk(str(made.file)).to_list() == [ROWS[index] for index in made.chosen]
    assert len(load_task(tmp_path / "out/task.yaml").items) == 6


def test_images_are_found_from_the_subset(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    rows = []
    for n in range(8):
        (tmp_path / f"pictures/{n}.png").write_bytes(b"A")
        turns = [
            {"role": "user", "content": "<image>what is this" * (n % 2 + 1)},
            {"role": "assistant", "content": f"{n}"},
        ]
        rows.append({"messages": turns, "images": [f"pictures/{n}.png"] * (n % 2 + 1)})
    rows += [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "images": []}]
    made = graftkit.subsample(data_file(tmp_path / "d.jsonl", rows), tmp_path / "out", 5, clusters=(2, 3))
    task = load_task(tmp_path / "out" / "task.yaml")
    assert task.chat and all(file.is_file() for item in task.items for file in task.pictures(item))
    assert made.records.pictured.tolist() == [True] * 8 + [False]


def test_the_record_says_how(tmp_path: Path) -> None:
    data = data_file(tmp_path / "d.jsonl", [*ROWS, *ROWS])
    graftkit.subsample(data, tmp_path / "out", 60, clusters=(2, 6), columns=COLUMNS, duplicates=0.999, seed=5)
    told = json.loads((tmp_path / "out/subsample.json").read_text())
    assert told["data"]["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert told["data"]["records"] == 80 and told["settings"]["seed"] == 5 and told["settings"]["count"] == 60
    assert told["embedder"]["name"] == "wordllama" and told["embedder"]["dimensions"] == 256
    assert told["chosen"] <= 40 and told["near_duplicates"] >= 40  # every record is there twice
    assert sum(told["clusters"]["chosen"]) == told["chosen"] and sum(told["clusters"]["sizes"]) == 80
    assert set(told["clusters"]["silhouettes"]) <= {"2", "3", "4", "5", "6"}
    with (tmp_path / "out/assignment.csv").open() as stream:
        states = [row["state"] for row in csv.DictReader(stream)]
    assert states.count("chosen") == told["chosen"] and states.count("near duplicate") == told["near_duplicates"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_a_subset(tmp_path: Path, method: Any) -> None:
    made = graftkit.subsample(data_file(tmp_path / "d.jsonl"), tmp_path / "o", 8, method=method, columns=COLUMNS)
    assert len(rows_of(made.file)) == 8 and 0 <= made.coverage.topics <= 1


def test_odd_data_are_no_trouble(tmp_path: Path) -> None:
    one = {"text": "alone"}
    assert len(graftkit.subsample(data_file(tmp_path / "a.jsonl", [one]), tmp_path / "a", 1).chosen) == 1
    same = data_file(tmp_path / "b.jsonl", [one] * 30)
    assert len(graftkit.subsample(same, tmp_path / "b", 7).chosen) == 7
    assert len(graftkit.subsample(same, tmp_path / "c", 7, duplicates=0.9).chosen) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 41}, r"d\.jsonl: expected at most as many as there are records, 40, got 41"),
        ({"count": 0}, "expected at least 1 record"),
        ({"method": "kmean"}, "expected one of kmeans, random, kcenter, herding, got 'kmean'"),
        ({"clusters": (9, 3)}, "expected a number or a range such as 8-64, got 9-3"),
        ({"duplicates": 1.5}, "expected a cosine above 0 and at most 1, got 1.5"),
        ({"seed": -3}, "seed: expected a number from 0 to 4294967295, got -3"),
        ({"seed": 1 << 32}, "seed: expected a number from 0"),
        ({"columns": {"promt": "question"}}, "columns: unknown column of ours 'promt'"),
        ({"columns": {"prompt": "solution", "answer": "answr"}}, r"d\.jsonl:1: columns: unknown column 'answr'"),
        ({"columns": {}}, r"d\.jsonl:1: no layout fits the columns question, solution, subtask, more"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    asked = {"count": 3, "columns": COLUMNS} | options
    with pytest.raises(DataError, match=message):
        graftkit.subsample(data_file(tmp_path / "d.jsonl"), tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_an_output_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        graftkit.subsample(data_file(tmp_path / "d.jsonl"), tmp_path / "out", 3, columns=COLUMNS)


def test_a_picture_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def draw(made: Any, directory: Path) -> None:
        assert (directory / "subset.jsonl").is_file() and not (tmp_path / "out").exists()
        raise OutputError("no room")

    data = data_file(tmp_path / "d.jsonl")
    (tmp_path / "out.partial").mkdir()  # somebody else's
    with pytest.raises(OutputError, match="no room"):
        graftkit.subsample(data, tmp_path / "out", 3, columns=COLUMNS, draw=draw)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "out.partial"]


# The program and its picture


def test_the_program_writes_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data, out = data_file(tmp_path / "d.jsonl"), tmp_path / "out"
    names = [f"--column={ours}={theirs}" for ours, theirs in COLUMNS.items()]
    done = CliRunner().invoke(app, ["subsample", str(data), str(out), "-n", "8", "--clusters", "2-5", *names])
    assert done.exit_code == 0, done.output
    assert "subset.jsonl: 8 of 40 records" in done.output and "random, as large" in done.output
    svg = (out / "landscape.svg").read_text()
    for text in (
        "t-SNE of 40 of 40 records, 8 of them chosen",
        "chosen: 8 of 40 records",
        "silhouette",
        "Which disease",
    ):
        assert text in svg
    assert (out / "landscape.png").read_bytes().startswith(b"\x89PNG")


def test_the_program_says_when_a_random_subset_covers_more(tmp_path: Path) -> None:
    data, out = data_file(tmp_path / "d.jsonl"), tmp_path / "out"
    told = ["-n", "12", "--clusters", "1", "--column=prompt=question", "--column=answer=solution", "--no-picture"]
    done = CliRunner().invoke(app, ["subsample", str(data), str(out), *told])
    assert done.exit_code == 0, done.output
    assert "note: a random subset lies nearer to the rest than this one; try --clusters 12" in done.output
    assert not (out / "landscape.svg").exists()


def test_the_program_prints_its_record_and_refuses_in_words(tmp_path: Path) -> None:
    data, words = data_file(tmp_path / "d.jsonl"), ["--column", "prompt=question", "--column", "answer=solution"]
    done = CliRunner().invoke(
        app, ["subsample", str(data), str(tmp_path / "o"), "-n", "5", *words, "--no-picture", "--json"]
    )
    assert json.loads(done.output)["chosen"] == 5 and not (tmp_path / "o/landscape.svg").exists()
    for wrong, message in (
        (["--clusters", "8to9"], "such as 8-64"),
        (["--column", "prompt"], "such as prompt=question"),
    ):
        done = CliRunner().invoke(app, ["subsample", str(data), str(tmp_path / "p"), "-n", "5", *wrong])
        assert isinstance(done.exception, DataError) and message in str(done.exception)


def test_a_picture_shows_at_most_so_many_points() -> None:
    chosen = np.arange(0, 9000, 2)
    rows = landscape.shown(9000, chosen, seed=0)
    assert len(rows) == landscape.POINTS == len(set(rows)) and np.isin(rows, chosen).sum() == landscape.CHOSEN
    assert landscape.shown(100, chosen[:5], 0).tolist() == list(range(100))
    assert len(landscape.shown(9000, np.arange(9000), 0)) == landscape.CHOSEN


def test_no_picture_of_next_to_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    few = graftkit.subsample(data_file(tmp_path / "d.jsonl", [{"text": "a"}] * 3), tmp_path / "a", 2)
    assert landscape.draw_landscape(few, tmp_path / "a") == ()
    same = graftkit.subsample(data_file(tmp_path / "e.jsonl", [{"text": "a"}] * 12), tmp_path / "b", 2)
    assert len(landscape.draw_landscape(same, tmp_path / "b")) == 2


def test_vectors_are_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wide:
        name, version, fingerprint = "wide", "1", ""

        def vectors(self, texts: list[str]) -> np.ndarray:
            return np.ones((len(texts), 1024), np.float32)

    rows, place = 8192, tmp_path / "d.txt"
    place.write_text("".join(f"text {n}\n" for n in range(rows)))
    with (tmp_path / "vectors").open("w+b") as held:
        tracemalloc.start()
        made = _read(place_of(place), Columns(), Wide(), held, None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert made.vectors.shape == (rows, 1024) and (made.vectors == 1).all()
    assert made.topics == ("",) * rows and not made.pictured.any()
    assert peak < made.vectors.nbytes * 0.7  # a batch of 512 in float32 and in float16, twice


def test_an_output_that_cannot_be_written_is_an_error_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written|exists"):
        graftkit.subsample(data_file(tmp_path / "d.jsonl"), tmp_path / "file" / "out", 3, columns=COLUMNS)
