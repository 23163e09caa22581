"""What a hostile file does to the loader: every refusal names a line or a row, and no file is held for a few items."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftkit.data import json_lists, load_task, load_tasks, reading
from graftkit.data.places import place_of
from graftkit.data.reading import read
from graftkit.errors import DataError
from graftkit.measuring import compatibility, evaluation

OK = {"prompt": "p", "answer": "a"}
TURNS = {"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "a"}]}
TEXTS = {"prompt": "p", "completion": "a"}
HIDDEN = {"prompt": "<image>p", "answer": "a", "images": []}


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


ATTACKS: list[tuple[str, bytes, str]] = [
    ("d.jsonl", lines(OK) + b"\0\0\0\n" + lines(OK), r"d\.jsonl:2: a NUL byte \(byte 0 of the line\)"),
    ("d.txt", "plain\n".encode("utf-16-le"), r"d\.txt:1: a NUL byte \(byte 1 of the line\)"),
    ("d.csv", b"prompt,answer\np,a\np\0,a\n", r"d\.csv:3: a NUL byte"),
    ("d.jsonl", lines(OK, {**OK, "subtask": True}), r"d\.jsonl:2: subtask: expected a text, got True"),
    ("d.jsonl", lines(TEXTS, TURNS), r"d\.jsonl:2: prompt: expected a text, as in the first record, got \["),
    ("d.jsonl", lines(TURNS, TEXTS), r"d\.jsonl:2: prompt: expected turns, as in the first record, got 'p'"),
    ("d.jsonl", lines(OK, HIDDEN), r"d\.jsonl:2: 0 images, but 1 <image>"),
    ("d.jsonl", lines(OK, {**HIDDEN, "images": None}), r"d\.jsonl:2: 0 images, but 1 <image>"),
    ("d.csv", b",prompt,answer\n0,p,a\n", r"d\.csv:1: column 1 has no name .*index=False"),
    (
        "d.json",
        b'{\n "data": [{"prompt": "p", "answer": "a"}]\n}',
        r"d\.json:1: not JSON: .*; expected a list \[\.\.\.\]",
    ),
    ("d.json", b"[\n" + b'{"text": "a"},\n' * 40_000 + b'{"text": "\xc3"}\n]', r"d\.json:40002: not UTF-8"),
    ("d.json", b'[{"text": "a"}]\n\xc3', r"d\.json:2: not UTF-8"),
]


@pytest.mark.parametrize(("name", "data", "message"), ATTACKS, ids=lambda value: str(value)[:24])
def test_hostile_files_are_refused_by_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_task(tmp_path / name)


def test_a_nul_that_json_writes_out_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'{"prompt": "p\\u0000", "answer": "a"}\n')
    assert load_task(tmp_path / "d.jsonl").items[0].prompt == "p\0"


def test_a_huge_element_of_a_list_is_refused_even_where_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LARGEST", 5000)
    (tmp_path / "d.json").write_text(json.dumps([OK, {"prompt": "c" * 6000, "answer": "a"}], indent=1))
    with pytest.raises(DataError, match=r"d\.json: record 2 \(line 6\): more than 5000 characters"):
        load_task(tmp_path / "d.json")


def test_columns_of_parquet_that_are_no_text_are_refused_by_row(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [b"p"] * 1500 + [b"\xff"]
    ends = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    broken = pa.Array.from_buffers(pa.string(), len(rows), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(rows))])
    pq.write_table(pa.table({"prompt": broken, "answer": ["a"] * len(rows)}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d\.parquet: row 1501: not UTF-8"):
        load_task(tmp_path / "d.parquet")
    twice = pa.Table.from_arrays([pa.array(["p"]), pa.array(["q"]), pa.array(["a"])], ["prompt", "prompt", "answer"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match=r"twice\.parquet: two columns are called 'prompt'"):
        load_task(tmp_path / "twice.parquet")


def test_what_datasets_stumbled_over_is_told(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.jsonl").write_bytes(lines(OK) + b"{bad\n")
    with pytest.raises(DataError, match=r"shards: `datasets` does not load it \(.*; JSON parse error: .* in row 1"):
        load_task(tmp_path / "shards")
    datasets.Dataset.from_list([]).save_to_disk(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="empty"):
        load_task(tmp_path / "empty")


# Streams: what only wants some items holds only those


@pytest.fixture
def large(tmp_path: Path) -> Path:
    (tmp_path / "large.jsonl").write_bytes(lines(*({"prompt": f"{n} " * 300, "answer": "a"} for n in range(6000))))
    return tmp_path / "large.jsonl"


def peak(work: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_limits_reach_the_loader(large: Path) -> None:
    assert peak(lambda: load_tasks([large])) > 6_000_000  # the file's 8 MB
    assert peak(lambda: load_tasks([large], 8)) < 3_000_000
    assert load_tasks([large], 8) == (load_task(large, 8),)
    assert peak(lambda: compatibility.loaded([large], 8)) < 3_000_000


def test_every_command_that_samples_loads_no_more(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reached(Exception):
        pass

    def stop(tasks: Any, run_code: bool) -> None:
        raise Reached

    monkeypatch.setattr(evaluation, "refuse_code", stop)

    def score() -> None:
        with pytest.raises(Reached):
            evaluation.evaluate([], [large], limit=8)

    assert peak(score) < 3_000_000


def test_lines_of_a_list_are_counted_where_it_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lists, "_CHUNK", 7)
    (tmp_path / "d.json").write_bytes(b'[\n{"text": "\xc3\xa4"},\n{"text": "\xc3"}]')
    with pytest.raises(DataError, match=r"d\.json:3: not UTF-8"):
        list(read(place_of(tmp_path / "d.json")))
