"""What a report says of the models behind merges: measured beside each other, and where they come from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import graftkit
import tiny
import vlms
from graftkit.cli import app
from graftkit.errors import DataError, GraftError
from graftkit.reporting import experts, records
from graftkit.reporting.lineage import lineage
from graftkit.reporting.report import write_report

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, two fine-tunes, a merge of them, and a merge of that merge and one of them, through a recipe's name."""
    monkeypatch.setenv("GRAFTKIT_CACHE", str(tmp_path / "cache"))
    tiny.family(tmp_path)
    inner = "method: task_arithmetic\nbase: base\nmodels: [math, code]\n"
    (tmp_path / "inner.yaml").write_text(inner)
    (tmp_path / "outer.yaml").write_text("method: ties\nbase: base\nmodels: [inner.yaml, math]\n")
    (tmp_path / "runs").mkdir()
    graftkit.merge(tmp_path / "inner.yaml", tmp_path / "runs" / "inner")
    graftkit.merge(tmp_path / "outer.yaml", tmp_path / "runs" / "outer")
    return tmp_path


def record(family: Path, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((family / "runs" / name / "graft.json").read_text())
    return found


def test_experts_are_measured_beside_each_other(family: Path) -> None:
    merges = [("a", record(family, "inner")), ("b", record(family, "inner")), ("c", record(family, "outer"))]
    inner, outer = experts.measure_experts(merges)
    assert inner.merges == ("a", "b") and outer.merges == ("c",) and inner.found and outer.found
    assert [pair.models for pair in outer.found.pairs] == [("inner.yaml", "math")]
    base, math, code = (
        load_file(family / name / "model.safetensors") if name != "math" else {} for name in ("base", "math", "code")
    )
    for file in sorted((family / "math").glob("*.safetensors")):
        math |= load_file(file)
    deltas = [
        np.concatenate([(one[n].float() - base[n].float()).numpy().ravel() for n in base]) for one in (math, code)
    ]
    cosine = deltas[0] @ deltas[1] / np.linalg.norm(deltas[0]) / np.linalg.norm(deltas[1])
    both = (deltas[0] != 0) & (deltas[1] != 0)
    conflicts = (np.sign(deltas[0]) != np.sign(deltas[1]))[both].mean()
    row = experts.pairs_table(inner.found).rows[0]
    assert row[0] == "math × code"
    assert row[1:3] == pytest.approx((cosine, 100 * conflicts), rel=1e-4, abs=1e-4)
    norms = [row[1] for row in experts.changes_table(inner.found).rows]
    assert norms == pytest.approx([np.linalg.norm(delta) for delta in deltas], rel=1e-4)
    captions = [caption for caption, _ in experts.pictures(inner.found)]
    assert [caption.split()[0] for caption in captions] == ["How", "Cosine", "Sign", "Sign"]


def test_text_experts_of_a_vlm_are_compared_without_it(tmp_path: Path) -> None:
    model = vlms.vlm("llava_next")
    vlms.saved(model, tmp_path / "vlm")
    for seed, name in enumerate(("base", "one", "two")):
        vlms.saved(vlms.base_of("llava_next", model, seed), tmp_path / name)
    recipe = "method: task_arithmetic\nbase: base\nvlm: vlm\nexperts: [one, two]\naccept_base: true\n"
    (tmp_path / "r.yaml").write_text(recipe)
    made = graftkit.merge(tmp_path / "r.yaml", tmp_path / "out")
    (found,) = experts.measure_experts([("out", made)])
    assert found.apart == "vlm" and not found.missing and found.found
    assert [change.models for change in found.found.changes] == [("one",), ("two",)]
    page = write_report(tmp_path / "r.html", title="t", evaluation=None, merges=[("out", made)], beside=[found])
    assert "vlm is left out" in page.read_text()


def test_what_is_gone_or_changed_is_said(family: Path) -> None:
    made = record(family, "inner")
    weights = family / "code" / "model.safetensors"
    held = bytearray(weights.read_bytes())
    held[-1] ^= 1
    weights.write_bytes(held)
    (changed,) = experts.measure_experts([("a", made)])
    assert changed.found is None and "code holds other weights now" in changed.missing
    shutil.rmtree(family / "code")
    (gone,) = experts.measure_experts([("a", made)])
    assert "code is not at" in gone.missing
    done = CliRunner().invoke(app, ["report", str(family / "runs" / "inner"), "--out", str(family / "r.html")])
    assert done.exit_code == 0 and "were not measured: code is not at" in done.output
    assert "Not measured: code is not at" in (family / "r.html").read_text()


def test_nested_recipes_have_a_lineage(family: Path) -> None:
    found = lineage(records.read(record(family, "outer")))
    assert [(one.role, one.source, one.kind) for one in found] == [
        ("base", "base", "checkpoint"), ("model", "inner.yaml", "recipe"), ("model", "math", "checkpoint"),
    ]  # fmt: skip
    assert "task_arithmetic" in found[1].recipe
    assert [one.source for one in found[1].ancestors] == ["base", "math", "code"]
    shutil.rmtree(family / "cache")
    assert "cleared from the cache" in lineage(records.read(record(family, "outer")))[1].note


def test_a_lineage_ends_where_it_turns_in_a_circle(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        inputs = [{"role": "model", "source": other, "kind": "checkpoint", "directory": str(tmp_path / other)}]
        (tmp_path / name / "graft.json").write_text(json.dumps({"format": 1, "recipe_yaml": name, "inputs": inputs}))
    (first,) = lineage(records.read(json.loads((tmp_path / "a" / "graft.json").read_text())))
    assert first.ancestors[0].ancestors[0].ancestors == ()


def test_the_page_shows_both(family: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(family / "runs"), "--out", str(family / "report.html")])
    assert done.exit_code == 0 and "2 merges, no evaluation" in done.output, done.output
    page = (family / "report.html").read_text()
    for text in ("The experts beside each other", "Other experts", "math × code", "Lineage", "Cosine of two deltas"):
        assert text in page
    bare = CliRunner().invoke(app, ["report", str(family / "runs"), "--no-inspect", "--out", str(family / "b.html")])
    assert bare.exit_code == 0 and "beside each other" not in (family / "b.html").read_text()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", '{"a": 1}', "x.json: neither a merge's record .* it has a"),
        ("x.json", "{}", "x.json: neither a merge's record .* it has nothing"),
        ("x.json", "[1]", "x.json: not a JSON object"),
        ("x.json", '{"a": ', "x.json: not valid JSON"),
        ("evaluation.json", '{"results": {}}', "evaluation.json: not an evaluation of format 1 or 2: it has results"),
        (
            "evaluation.json",
            '{"format": 2, "scores": null}',
            "evaluation.json: not an evaluation: models: Field required",
        ),
        ("graft.json", '{"format": 1, "tensors": 3}', "not a merge's record: tensors"),
        ("graft.json", "{}", "not a merge's record of format 1"),
    ],
)
def test_foreign_json_is_refused_in_one_sentence(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    done = CliRunner().invoke(app, ["report", str(tmp_path / name), "--out", str(tmp_path / "r.html")])
    assert isinstance(done.exception, GraftError) and not (tmp_path / "r.html").exists()
    with pytest.raises(GraftError, match=message):
        raise done.exception
    assert "\n" not in str(done.exception)


def test_a_missing_run_is_named(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(tmp_path / "no")])
    assert isinstance(done.exception, GraftError) and "no such file or directory" in str(done.exception)
    assert not isinstance(done.exception, DataError)
