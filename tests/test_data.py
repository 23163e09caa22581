"""One loader for every format and layout, and what it refuses."""

from __future__ import annotations

import codecs
import gzip
import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftkit.data import Item, json_lists, load_task, load_tasks, reading
from graftkit.data.places import fingerprint, place_of
from graftkit.data.reading import read
from graftkit.data.tasks import sample
from graftkit.errors import DataError, GraftError
from graftkit.measuring.encoding import encode

PAIRS = [{"prompt": "p\u2028\n", "answer": "ä"}, {"prompt": "", "answer": 'b,"c'}, {"prompt": "q", "answer": "\tz"}]


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    """The records in the format that the path's ending names."""
    ending = path.name.removesuffix(".gz").rpartition(".")[2]
    if ending == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=2)
        return path
    if ending in ("csv", "tsv"):
        import csv
        import io

        text = io.StringIO()
        rows = csv.DictWriter(text, list(records[0]), delimiter="," if ending == "csv" else "\t")
        rows.writeheader()
        rows.writerows(records)
        data = text.getvalue()
    elif ending == "json":
        data = json.dumps(records, indent=1, ensure_ascii=False)
    else:
        data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    raw = data.encode()
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)
    return path


FORMATS = ("d.jsonl", "d.ndjson", "d.json", "d.csv", "d.tsv", "d.parquet", "d.jsonl.gz", "d.csv.gz", "d.json.gz")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_items(tmp_path: Path, name: str) -> None:
    task = load_task(written(tmp_path / name, PAIRS))
    assert task.items == tuple(Item(one["prompt"], (one["answer"],)) for one in PAIRS)
    assert (task.name, task.kind, task.chat, len(task.fingerprint)) == ("d", "answer_loss", False, 64)


LAYOUTS: list[tuple[dict[str, Any], Item, bool]] = [
    ({"prompt": "p", "answer": "a", "subtask": "s"}, Item("p", ("a",), subtask="s"), False),
    ({"prompt": "p", "completion": " a", "extra": 1}, Item("p", (" a",)), False),
    ({"instruction": "p", "input": "", "output": "a"}, Item("p", ("a",)), True),
    ({"instruction": "p", "input": None, "output": "a"}, Item("p", ("a",)), True),
    ({"instruction": "p", "input": "x", "output": "a", "system": "s"},
     Item("p\nx", ("a",), before=(("system", "s"),)), True),
    ({"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]}, Item("p", ("a",)), True),
    ({"messages": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "a"}]}, Item("p", ("a",)), True),
    ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"},
                   {"role": "assistant", "content": "a"}, {"role": "user", "content": "q"},
                   {"role": "assistant", "content": "b"}]},
     Item("q", ("b",), before=(("system", "s"), ("user", "p"), ("assistant", "a"))), True),
    ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "p"}]}],
      "completion": [{"role": "assistant", "content": "a"}]}, Item("p", ("a",)), True),
    ({"text": "whole"}, Item("", ("whole",)), False),
]  # fmt: skip


@pytest.mark.parametrize(("record", "item", "chat"), LAYOUTS, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.parquet"])
def test_every_layout_becomes_prompt_and_answer(
    tmp_path: Path, record: dict[str, Any], item: Item, chat: bool, name: str
) -> None:
    task = load_task(written(tmp_path / name, [record, record]))
    assert task.items == (item, item) and task.chat == chat


def test_conversations_are_rendered_turn_by_turn() -> None:
    item = Item("q", ("b",), before=(("system", "s"), ("user", "p"), ("assistant", "a")))
    assert [turn["role"] for turn in item.messages] == ["system", "user", "assistant", "user"]
    assert item.messages[-1]["content"] == "q"


def test_a_template_that_refuses_a_conversation_is_an_error_of_the_data(tmp_path: Path) -> None:
    from jinja2 import TemplateError

    class Tokenizer:
        chat_template = "no system"

        def apply_chat_template(self, messages: list[dict[str, str]], **how: Any) -> str:
            raise TemplateError("System role not supported")

    task = load_task(written(tmp_path / "d.jsonl", [{"instruction": "p", "system": "s", "output": "a"}]))
    with pytest.raises(DataError, match="task d, item 0: the model's chat template refuses it: System role"):
        encode(Tokenizer(), task)


def test_a_text_file_is_a_text_a_line(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(codecs.BOM_UTF8 + "eins\r\n\r\nzwei ü".encode())
    task = load_task(tmp_path / "t.txt")
    assert [item.choices for item in task.items] == [("eins",), ("zwei ü",)] and {i.prompt for i in task.items} == {""}


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.json"])
def test_byte_order_marks_and_windows_line_ends_change_nothing(tmp_path: Path, name: str) -> None:
    plain = [{"prompt": "p", "answer": "a"}, {"prompt": "p", "answer": "a"}]
    data = written(tmp_path / name, plain).read_bytes().replace(b"\r\n", b"\n")
    (tmp_path / name).write_bytes(codecs.BOM_UTF8 + data.replace(b"\n", b"\r\n"))
    assert load_task(tmp_path / name).items == (Item("p", ("a",)),) * 2


def test_a_description_names_files_of_every_kind_and_their_columns(tmp_path: Path) -> None:
    written(tmp_path / "d.csv", [{"question": "p", "solution": "a", "topic": "t", "answer": "not this one"}])
    (tmp_path / "t.yaml").write_text(
        "kind: answer_loss\ndata: d.csv\ncolumns: {prompt: question, answer: solution, subtask: topic}\nchat: true\n"
        "template: 'Q: {prompt}'\n"
    )
    task = load_task(tmp_path / "t.yaml")
    assert task.items == (Item("Q: p", ("a",), subtask="t"),) and task.chat and task.name == "t"
    (tmp_path / "t.yaml").write_text("kind: exact_match\ndata: d.csv\ncolumns: {prompt: question}\n")
    assert load_task(tmp_path / "t.yaml").items == (Item("p", ("not this one",)),)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("{promt: question}", r"t\.yaml: columns: unknown column of ours 'promt'; did you mean 'prompt'"),
        ("{prompt: qestion}", r"d\.csv:2: columns: unknown column 'qestion'; did you mean 'question'"),
        ("{prompt: 3}", r"t\.yaml: columns\.prompt: expected the name of a column, got 3"),
        ("[prompt]", "columns: expected a mapping"),
        ("{prompt: question}\nimages: nowhere", "images: .*nowhere is no directory"),
        ("{prompt: question}\nimages: [a]", "images: expected a text"),
    ],
)
def test_bad_columns_are_refused(tmp_path: Path, columns: str, message: str) -> None:
    written(tmp_path / "d.csv", [{"question": "p", "answer": "a"}])
    (tmp_path / "t.yaml").write_text(f"kind: answer_loss\ndata: d.csv\ncolumns: {columns}\n")
    with pytest.raises(DataError, match=message):
        load_task(tmp_path / "t.yaml")


BROKEN: list[tuple[str, bytes, str]] = [
    (
        "d.jsonl",
        b'{"prompt": "p", "answer": "a"}\n\n{"prompt": }\n',
        r"d\.jsonl:3: not JSON: Expecting value \(character 12\)",
    ),
    ("d.jsonl", b'{"prompt": "p", "answer": "a"}\n{"text": "p"}\n', r"d\.jsonl:2: unknown field 'text'"),
    ("d.jsonl", b'{"text": "p"}\n{"prompt": "p"}\n', r"d\.jsonl:2: text is missing .*; got prompt"),
    (
        "d.jsonl",
        b'{"instruction": "p", "outptu": "p"}\n',
        r"d\.jsonl:1: no layout fits the columns instruction, outptu",
    ),
    (
        "d.jsonl",
        b'{"instruction": "p", "inputs": "x", "output": "p"}\n',
        "unknown field 'inputs'; did you mean 'input'",
    ),
    ("d.jsonl", b'{"prompt": "p", "completion": 3}\n', r"d\.jsonl:1: completion: expected a text, got 3"),
    ("d.jsonl", b"{}\n", r"d\.jsonl:1: no layout fits the columns \(none\)"),
    ("d.jsonl", b'{"text": ""}\n', "text: expected a text, got an empty one"),
    ("d.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"d\.jsonl:2: not UTF-8 \(byte 10 of the line\)"),
    ("d.jsonl", '{"text": "a"}\n'.encode("utf-16"), r"d\.jsonl:1: not UTF-8"),
    ("d.jsonl", b"", "no records"),
    ("d.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", r"d\.jsonl:1: not JSON"),
    ("d.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", r"d\.jsonl:1: not JSON"),
    ("d.jsonl", b'{"text": "\\ud83d\\ude00"}\n{"text": "a \\uD83D"}\n', r"d\.jsonl:2: \\ud83d is half of a surrogate"),
    ("d.json", b'[{"text": "a \\ude00"}]', r"d\.json: record 1 \(line 1\): \\ude00 is half of a surrogate"),
    ("d.json", b"", "no records"),
    ("d.json", b"[]", "no records"),
    ("d.json", b'[\n{"text": "a"},\n{"text": "b"\n', r"d\.json: record 2 \(line 3\): not JSON"),
    ("d.json", b'[\n{"text": "a"}\n{"text": "b"}]', r"d\.json:3: not JSON: expected a comma"),
    ("d.json", b'[{"text": "a"}] x', r"d\.json:1: more text after the list's end"),
    ("d.json", b'[{"text": "a"}, 3]', r"record 2 \(line 1\): expected an object"),
    ("d.json", b'[{"text": "a"},]', r"record 2 \(line 1\): not JSON"),
    ("d.json", b'{\n "text": "a"\n}', r"d\.json:1: not JSON"),
    ("d.json", b'[{"text": "\xe9"}]', "not UTF-8"),
    ("d.csv", b"prompt,answer\np,a\np\n", r"d\.csv:3: expected 2 values \(prompt, answer\), got 1"),
    ("d.csv", b'prompt,answer\n"p\np",a\n"p"x,a\n', r"d\.csv:4: not CSV"),
    ("d.csv", b"prompt,prompt\np,a\n", r"d\.csv:1: two columns are called 'prompt'"),
    ("d.csv", b"prompt,answer\n\n", "no records"),
    ("d.csv", b"a,b\n1,2\n", r"d\.csv:2: no layout fits the columns a, b"),
    ("d.parquet", b"PAR1 and then nothing", "not a Parquet file"),
    ("d.jsonl.gz", b"not packed", "cannot be read"),
    ("d.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "cannot be read"),
    ("d.parquet.gz", b"", r"got '\.parquet\.gz'"),
]


@pytest.mark.parametrize(("name", "data", "message"), BROKEN, ids=lambda value: str(value)[:24])
def test_broken_files_are_refused_by_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_task(tmp_path / name)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "expected a list of turns"),
        ("hello", "expected a list of turns"),
        (["hello"], r"messages\[0\]: expected role and content"),
        ([{"role": "usr", "content": "p"}], r"unknown role 'usr'; did you mean 'user'"),
        ([{"role": "user", "content": None}], r"content: expected a text, got None"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "expected parts of type text or image"),
        (
            [{"role": "user", "content": "p"}],
            "expected an answer of the assistant as the last turn, got one of the user",
        ),
        ([{"role": "assistant", "content": "a"}], "expected a user's turn before the last one, got none"),
        ([{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}], "got the system's"),
        ([{"role": "user", "content": "p"}, {"role": "assistant", "content": ""}], "assistant, empty"),
    ],
)
def test_bad_conversations_are_refused(tmp_path: Path, messages: Any, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    with pytest.raises(DataError, match=rf"d\.jsonl:1: .*{message}"):
        load_task(path)


def test_several_turns_and_texts_say_whether_they_are_chats(tmp_path: Path) -> None:
    written(tmp_path / "m.jsonl", [{"instruction": "p", "system": "s", "output": "a"}])
    written(tmp_path / "t.jsonl", [{"text": "a"}])
    for data, chat, message in (("m.jsonl", "false", "expected true"), ("t.jsonl", "true", "a text alone is no chat")):
        (tmp_path / "t.yaml").write_text(f"kind: answer_loss\ndata: {data}\nchat: {chat}\n")
        with pytest.raises(DataError, match=message):
            load_task(tmp_path / "t.yaml")


# Images


def with_images(tmp_path: Path, images: Any, text: str = "<image>what?") -> Path:
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    (tmp_path / "data" / "pictures" / "a.png").write_bytes(b"A")
    (tmp_path / "secret.png").write_bytes(b"S")
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]
    return written(tmp_path / "data" / "d.jsonl", [{"messages": turns, "images": images}])


def test_images_are_found_beside_the_data(tmp_path: Path) -> None:
    task = load_task(with_images(tmp_path, ["pictures/../pictures/a.png"]))
    assert task.items[0].images == ("pictures/a.png",) and task.items[0].prompt == "<image>what?"
    assert [file.read_bytes() for file in task.pictures(task.items[0])] == [b"A"]
    before = task.content
    (tmp_path / "data" / "pictures" / "a.png").write_bytes(b"B")
    assert task.content != before


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        (["../secret.png"], "<image>", "lies outside of"),
        (["/etc/hostname"], "<image>", "lies outside of"),
        (["link.png"], "<image>", "lies outside of"),
        (["pictures/b.png"], "<image>", "does not exist"),
        (["pictures/a.png"], "what?", "1 images, but 0 <image>"),
        (["pictures/a.png"], "<image><image>", "1 images, but 2 <image>"),
        ([{"bytes": "x"}], "<image>", "expected a list of paths"),
        (["a\0b"], "<image>", "is no path"),
    ],
)
def test_images_elsewhere_are_refused(tmp_path: Path, images: Any, text: str, message: str) -> None:
    path = with_images(tmp_path, images, text)
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match=rf"d\.jsonl:1: .*{message}"):
        load_task(path)


def test_a_description_may_name_another_directory_of_images(tmp_path: Path) -> None:
    path = with_images(tmp_path, [str(tmp_path / "secret.png")])
    (tmp_path / "data" / "t.yaml").write_text(f"kind: answer_loss\ndata: {path.name}\nimages: {tmp_path}\n")
    task = load_task(tmp_path / "data" / "t.yaml")
    assert task.items[0].images == ("secret.png",) and task.pictures(task.items[0])[0].read_bytes() == b"S"
    assert task.chat


def test_images_belong_to_every_kind_of_task(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"A")
    asked = {"prompt": "<image>?", "choices": ["a", "b"], "answer": 1, "images": ["a.png"]}
    assert load_task(written(tmp_path / "d.jsonl", [asked])).items[0].images == ("a.png",)


# Streams


def test_a_limit_draws_what_sample_draws(tmp_path: Path) -> None:
    path = written(tmp_path / "d.jsonl", [{"prompt": str(n), "answer": "a"} for n in range(60)])
    assert load_task(path, limit=7) == sample(load_task(path), 7)
    assert load_task(path, limit=60) == load_task(path, limit=99) == load_task(path)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.jsonl.gz"])
def test_large_files_are_never_held(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, [{"prompt": f"{n}" * 40, "answer": "a" * 2000} for n in range(4000)])
    tracemalloc.start()
    assert sum(1 for _ in read(place_of(path))) == 4000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000  # of 9 MB


def test_parquet_is_read_by_batches_and_only_what_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BATCH", 2)
    path = written(tmp_path / "d.parquet", [{"prompt": str(n), "answer": "a", "heavy": "x" * 99} for n in range(5)])
    records = list(read(place_of(path), ("prompt", "answer")))
    assert [record.where.rpartition(": ")[2] for record in records] == [f"row {n}" for n in range(1, 6)]
    assert records[4].fields == {"prompt": "4", "answer": "a"}
    assert "heavy" in next(iter(read(place_of(path)))).fields


def test_huge_records_are_refused_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LARGEST", 5000)
    monkeypatch.setattr(json_lists, "_CHUNK", 64)
    fine = [{"text": "a"}, {"text": "b" * 4000}]
    for name in ("d.jsonl", "d.json"):
        assert len(load_task(written(tmp_path / name, fine)).items) == 2
    (tmp_path / "d.jsonl").write_text(json.dumps(fine[0]) + "\n" + json.dumps({"text": "c" * 6000}))
    with pytest.raises(DataError, match=r"d\.jsonl:2: a line of more than"):
        load_task(tmp_path / "d.jsonl")
    (tmp_path / "d.json").write_text('[{"text": "a"}, {"text": "' + "c" * 60_000)
    with pytest.raises(DataError, match=r"record 2 \(line 1\): not JSON"):
        load_task(tmp_path / "d.json")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), min_size=1, max_size=6), st.integers(1, 40))
def test_lists_read_in_pieces_are_what_json_reads(tmp_path_factory: Any, records: list[Any], chunk: int) -> None:
    path = tmp_path_factory.mktemp("lists") / "d.json"
    for indent in (None, 2):
        path.write_text(json.dumps(records, indent=indent), encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_lists, "_CHUNK", chunk)
            found = list(read(place_of(path)))
        assert [record.fields for record in found] == records == [json.loads(record.raw) for record in found]


def test_raw_texts_put_together_are_the_file(tmp_path: Path) -> None:
    for name in ("d.jsonl", "d.csv"):
        path = written(tmp_path / name, PAIRS)
        text = path.read_bytes().decode()
        assert text.endswith("".join(record.raw for record in read(place_of(path))))


# Places


def test_fingerprints_are_of_the_content(tmp_path: Path) -> None:
    one = written(tmp_path / "a.jsonl", PAIRS)
    (tmp_path / "b.jsonl").write_bytes(one.read_bytes())
    assert fingerprint(place_of(one)) == fingerprint(place_of(tmp_path / "b.jsonl"))
    written(tmp_path / "b.jsonl", PAIRS[1:])
    assert fingerprint(place_of(one)) != fingerprint(place_of(tmp_path / "b.jsonl"))


@pytest.mark.parametrize(
    "name", ["absent.jsonl", "owner/absent.jsonl", "../x", "x" * 5000, "a\0b", "~nobody/x.jsonl", "plain"]
)
def test_places_that_do_not_exist_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="does not exist"):
        place_of(name, tmp_path)


def test_a_directory_without_datasets_says_which_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(GraftError, match=r"pip install 'graftkit\[datasets\]'"):
        load_tasks([tmp_path])


def test_parquet_without_its_extra_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(GraftError, match=r"pip install 'graftkit\[data\]'"):
        load_task(tmp_path / "d.parquet")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"instruction": f"p{n}", "input": "", "output": "a"} for n in range(5)])
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_saved_data_sets_load_by_split(saved: Path) -> None:
    task = load_task(f"{saved}#test")
    assert task.items == (Item("p1", ("a",)),) and task.chat and task.name == "saved"
    assert load_task(f"{saved}#train").fingerprint != task.fingerprint == load_task(f"{saved}#test").fingerprint
    assert len(load_tasks([f"{saved}#train"])[0].items) == 5
    with pytest.raises(DataError, match="several splits .*; name one"):
        load_task(saved)
    with pytest.raises(DataError, match="unknown split 'tst'; did you mean 'test'"):
        load_task(f"{saved}#tst")
    shards = saved / "train"
    assert len(load_task(shards).items) == 5


def test_a_directory_of_shards_and_a_hub_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "shards").mkdir()
    for number in range(2):
        written(tmp_path / "shards" / f"train-{number}.jsonl", [{"text": f"t{number}"}])
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    assert [item.choices[0] for item in load_task(f"{tmp_path / 'shards'}#train").items] == ["t0", "t1"]
    with pytest.raises(DataError, match="nobody/nothing: `datasets` does not load it"):
        load_task("nobody/nothing#train")


def test_the_hubs_cache_serves_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    written(tmp_path / "train.jsonl", [{"instruction": "p", "output": "a"}] * 3)
    builder = datasets.load_dataset_builder(
        "json", data_files={"train": str(tmp_path / "train.jsonl")}, cache_dir=str(tmp_path / "cache")
    )
    kept = tmp_path / "cache" / "owner___kept" / "default" / "0.0.0" / ("a" * 40)
    builder.download_and_prepare(str(kept))
    for file in kept.glob("json-*"):
        file.rename(kept / file.name.replace("json-", "kept-"))
    task = load_task("owner/kept#train")
    assert task.items == (Item("p", ("a",)),) * 3 and (task.name, task.chat) == ("kept", True)
