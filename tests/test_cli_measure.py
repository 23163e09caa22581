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
