"""Scores kept between runs: read back for the same model and task, and never for others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import graftkit.measuring.jobs as jobs
from graftkit.data import Generation, Item, Task
from graftkit.measuring.cache import fingerprint
from graftkit.measuring.evaluation import evaluate
from talker import tiny, tokenizer

LOSS = Task("loss", "answer_loss", (Item("two and", (" four",)), Item("Berlin is", (" a city",))))
CHOICE = Task("choice", "multiple_choice", (Item("Berlin is", (" two", " a city"), 1),))
EXACT = Task("exact", "exact_match", (Item("Berlin is", ("a city",)),), generation=Generation(4))
TASKS = [LOSS, CHOICE, EXACT]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(models: list[Any], tasks: list[Task], tmp_path: Path, **more: Any) -> list[tuple[bool, Any]]:
    found = evaluate(models, tasks, cache=tmp_path / "cache", resamples=20, device="cpu", **more)
    return [(score.cached, score.items) for score in found.scores]


def test_a_second_run_reads_the_cache(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run([model], TASKS, tmp_path)
    monkeypatch.setattr(jobs, "opened", lambda *_, **__: pytest.fail("the model was loaded"))
    again = run([model], TASKS, tmp_path)
    assert [cached for cached, _ in first] == [False] * 3 and [cached for cached, _ in again] == [True] * 3
    assert [items for _, items in first] == [items for _, items in again]
    renamed = [replace(task, name=f"other {task.name}") for task in TASKS]
    assert all(cached for cached, _ in run([model], renamed, tmp_path))


def test_other_content_is_computed_anew(model: Path, tmp_path: Path) -> None:
    run([model], TASKS, tmp_path)
    asked = [
        replace(LOSS, items=LOSS.items[:1]), replace(CHOICE, items=(Item("Berlin", (" two", " a city"), 1),)),
        replace(EXACT, generation=Generation(5)),
    ]  # fmt: skip
    assert not any(cached for cached, _ in run([model], asked, tmp_path))
    assert not run([model], [LOSS], tmp_path, dtype="bfloat16")[0][0]
    weights = model / "model.safetensors"
    held = bytearray(weights.read_bytes())
    held[-2001] ^= 1  # one bit, anywhere
    weights.write_bytes(held)
    assert not run([model], [LOSS], tmp_path)[0][0]


def test_what_a_model_says_depends_on_its_small_files_too(model: Path) -> None:
    before = fingerprint(str(model), None)
    (model / "graft.json").write_text("{}")
    assert fingerprint(str(model), None) == before is not None
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert fingerprint(str(model), None) != before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_is_known_with_its_base(model: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(tiny(), config).save_pretrained(tmp_path / "adapter")
    other = tmp_path / "other"
    tiny(1).save_pretrained(other)
    tokenizer().save_pretrained(other)
    on_model, on_other = (fingerprint(str(tmp_path / "adapter"), str(base)) for base in (model, other))
    assert on_model and on_other and on_model != on_other
    assert fingerprint(str(tmp_path / "adapter"), None) is None
    scores = [run([tmp_path / "adapter"], [LOSS], tmp_path, adapter_base=base) for base in (model, model, other)]
    assert [score[0][0] for score in scores] == [False, True, False]


def test_torn_files_count_as_absent_and_live_models_are_not_kept(model: Path, tmp_path: Path) -> None:
    first = run([model], [LOSS], tmp_path)
    (file,) = (tmp_path / "cache").iterdir()
    for torn in ("", "{", "[]", '{"items": [{}], "seconds": 1}', json.dumps({"items": [], "seconds": 0})):
        file.write_text(torn)
        assert run([model], [LOSS], tmp_path) == first
    live = ("live", tiny(), tokenizer())
    assert [run([live], [LOSS], tmp_path)[0][0] for _ in range(2)] == [False, False]
    assert len(list((tmp_path / "cache").iterdir())) == 1
