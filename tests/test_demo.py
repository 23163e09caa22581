"""The demo's examples are training records of its experts, and the demo runs as its users run it."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "examples" / "demo" / "data"


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("skill", ["math", "code"])
def test_no_example_is_asked_in_a_task(skill: str) -> None:
    examples = {str(row["prompt"]) for row in lines(DATA / f"{skill}.jsonl")}
    assert len(examples) == 24
    for task in (ROOT / "examples" / "orchard" / "tasks").glob("*.jsonl"):
        assert not examples & {str(row["prompt"]) for row in lines(task)}, task.name


def test_the_examples_can_be_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "orchard"))
    spec = importlib.util.spec_from_file_location("make_data", ROOT / "examples" / "demo" / "make_data.py")
    assert spec and spec.loader
    make_data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_data)
    made = [{"prompt": one.prompt, "answer": one.answer, "subtask": one.subtask} for one in make_data.drawn("math")]
    assert made == lines(DATA / "math.jsonl")


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "demo").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_has_the_demo_s_models(path: Path) -> None:
    told = yaml.safe_load(path.read_text(encoding="utf-8"))
    models = [one["model"] if isinstance(one, dict) else one for one in told["models"]]
    assert [Path(one).name for one in models] == ["math", "code"]
    assert all((path.parent / one / "adapter_config.json").is_file() for one in models)
