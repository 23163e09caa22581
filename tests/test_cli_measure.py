"""`graft evaluate` and `graft report`, as a user runs them, on a tiny model with a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import graftkit
import tiny
from graftkit.cli import app
from graftkit.errors import GraftError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models with a tokenizer, one merge of them, one task."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        ["one two three"], trainers.BpeTrainer(vocab_size=tiny.VOCABULARY, special_tokens=["<unk>"])
    )
    for path in tiny.family(root)[:2]:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    recipe = {"method": "average", "models": [str(root / "base"), str(root / "math")]}
    graftkit.merge(recipe, root / "merged")
    rows = [{"prompt": "one", "answer": " two three"}, {"prompt": "two", "answer": " one"}]
    (root / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_evaluate_then_report(run: Path) -> None:
    models = [str(run / name) for name in ("base", "math", "merged")]
    options = ["--tasks", str(run / "task.jsonl"), "--out", str(run / "evaluation.json"), "--threads", "1"]
    done = CliRunner().invoke(app, ["evaluate", *models, *options])
    assert done.exit_code == 0 and "merged" in done.output
    done = CliRunner().invoke(app, ["report", str(run), "--out", str(run / "report.html")])
    assert done.exit_code == 0 and "1 merges, evaluated" in done.output
    page = (run / "report.html").read_text()
    assert "merged" in page and "average" in page and 'src="http' not in page


def test_a_report_on_nothing_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert isinstance(done.exception, GraftError) and "neither a merge" in str(done.exception)


def test_inspect_and_convert_say_what_is_wrong(tmp_path: Path) -> None:
    for arguments in (["inspect", str(tmp_path)], ["convert", str(tmp_path / "no.gguf"), str(tmp_path / "out")]):
        done = CliRunner().invoke(app, arguments)
        assert isinstance(done.exception, GraftError)


def evaluate(run: Path, *arguments: str) -> str:
    done = CliRunner().invoke(app, ["evaluate", *arguments, "--threads", "1"])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_experts_and_base_are_evaluated_with_the_models(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTKIT_CACHE", str(run / "cache"))
    rows = "".join(json.dumps({"prompt": "one", "answer": "two"}) + "\n" for _ in range(4))
    (run / "words.jsonl").write_text(rows)
    (run / "words.yaml").write_text("kind: exact_match\ndata: words.jsonl\nmax_new_tokens: 3\n")
    roles = ["--base", str(run / "base"), "--expert", f"task={run / 'math'}"]
    files = ["-t", str(run / "task.jsonl"), str(run / "words.yaml")]  # as a shell's `*` puts them
    output = evaluate(run, str(run / "merged"), *files, *roles, "--subtasks")
    for text in ("merged", "minus base", "normalised score", "exact_match", "words by subtask"):
        assert text in output
    told = json.loads(evaluate(run, str(run / "merged"), *files, *roles, "--json", "--limit", "1"))
    assert told["models"] == ["base", "math", "merged"] and told["experts"] == {"task": "math"}
    assert [one["model"] for one in told["comparisons"]] == ["math", "merged"]
    assert set(told["normalised"]["merged"]) == {"task", "mean"} and told["tasks"][0]["items"] == 1
    assert "were read from the cache" in evaluate(run, str(run / "merged"), *files, *roles)
    assert "from the cache" not in evaluate(run, str(run / "merged"), *files, *roles, "--no-cache")
    against = json.loads(evaluate(run, str(run / "base"), *files, str(run / "merged"), "--against", "base", "--json"))
    assert [one["other"] for one in against["comparisons"]] == ["base"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base"], "no task given"),
        (["-t", "task.jsonl"], "no model given"),
        (["base", "-t", "task.jsonl", "--expert", "math"], "expected SKILL=MODEL"),
        (["base", "-t", "task.jsonl", "--expert", "a=b", "--expert", "a=c"], "a has two experts"),
        (["base", "-t", "task.jsonl", "--expert", "tsk=base"], "unknown skill 'tsk'; did you mean 'task'"),
        (["base", "-t", "code.jsonl"], "runs programs that the models write"),
        (["base", "-t", "task.jsonl", "--against", "bas"], "bas: "),
    ],
)
def test_what_cannot_be_evaluated_is_said(
    run: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(run)
    monkeypatch.setenv("GRAFTKIT_CACHE", str(run / "cache"))
    (run / "code.jsonl").write_text(json.dumps({"prompt": "def f():", "test": "f()"}) + "\n")
    with pytest.raises(GraftError, match=message):
        evaluate(run, *arguments)
