"""What gates did, for people: in `graft inspect`, and in the report's pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import graftkit
import tiny
from graftkit.checkpoints.gates import write_gates
from graftkit.checkpoints.sources import open_checkpoint
from graftkit.cli import app
from graftkit.reporting import gates, plots, records
from graftkit.reporting.report import write_report

MATRICES = {name: shape for name, shape in tiny.shapes().items() if len(shape) == 2 and "embed" not in name}
CURVE = [[1, 2.0, 0.1, None], [2, 1.5, 0.1, 1.8], [3, 1.4, 0.05, None], [4, 1.3, 0.0, 1.4]]


def merged(root: Path, kind: str = "local", method: str = "graft", **knobs: object) -> dict:
    """A merge by gates that lean to the first model in the first layer's rows, with a training to tell of."""
    base, *tuned = tiny.family(root, dtype=torch.float32)
    own = {n: np.full((2, shape[0]), 0.5, np.float32) for n, shape in MATRICES.items()}
    for name, values in own.items():
        if ".layers.0." in name:
            values[:] = [[0.9], [0.1]]
    told = {"training": json.dumps({"course": {"first": 2.2, "curve": CURVE}})}
    prints = [open_checkpoint(one).fingerprint() for one in tuned]
    write_gates(root / "gates.safetensors", own, kind=kind, models=prints, about=told)
    recipe = {"method": method, "base": str(base), "models": list(map(str, tuned)), "knobs": knobs}
    if method == "graft":
        recipe.pop("base")
    return graftkit.merge({**recipe, "gates": str(root / "gates.safetensors")}, root / "out")


def test_the_record_tells_signals_and_weights_of_every_matrix(tmp_path: Path) -> None:
    record = merged(tmp_path)
    assert record["gates"]["training"]["course"]["curve"] == CURVE
    line = next(one for one in record["tensors"] if one["name"] == "model.layers.0.mlp.up_proj.weight")
    low, _, middle, _, high = line["weights"][0]
    assert low == middle == high > 0.5 and abs(line["mean_weights"][0] + line["mean_weights"][1] - 1) < 1e-6
    apart = line["entropy"][0] - line["entropy"][1]
    assert line["w_global"][0] == pytest.approx(0.5 + 0.4 / np.pi * np.arctan(500 * apart), abs=1e-5)
    norm = next(one for one in record["tensors"] if one["name"] == "model.norm.weight")
    assert "weights" not in norm


@pytest.mark.parametrize("tensors", [False, True])
def test_inspect_shows_gates_of_merges_and_of_files(tmp_path: Path, tensors: bool) -> None:
    merged(tmp_path)
    flag = ["--tensors"] if tensors else []
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out"), *flag], terminal_width=200)
    assert shown.exit_code == 0 and "weights by gates in out" in shown.output and "w_global" in shown.output
    table = gates.gates_table("out", records.read(json.loads((tmp_path / "out" / "graft.json").read_text())), tensors)
    assert table is not None and len(table.rows) == 2 * (len(MATRICES) if tensors else 7 + 1)
    file = CliRunner().invoke(app, ["inspect", str(tmp_path / "gates.safetensors"), "--json", *flag])
    told = json.loads(file.stdout)
    assert len(told) == 1 and len(told[0]["rows"]) == 2 * (len(MATRICES) if tensors else 7)


def test_the_report_has_a_heat_map_of_weights_and_the_curve(tmp_path: Path) -> None:
    merged(tmp_path)
    record = json.loads((tmp_path / "out" / "graft.json").read_text())
    page = write_report(tmp_path / "report.html", title="t", evaluation=None, merges=[("out", record)]).read_text()
    assert "Weight of math (model.layers)" in page and "How the gates were learnt" in page
    assert "Entropy of math less that of the others" in page
    plain = {**record, "tensors": [{"name": "a.0.b.weight", "shape": [2, 2]}], "gates": {}}
    assert gates.pictures(records.read(plain)) == []


def test_free_coefficients_have_a_picture_for_each_model(tmp_path: Path) -> None:
    merged(tmp_path, "coefficient", "graft_free")
    record = records.read(json.loads((tmp_path / "out" / "graft.json").read_text()))
    captions = [caption for caption, _ in gates.pictures(record)]
    assert "Weight of math (model.layers)" in captions and "Weight of code (model.layers)" in captions


def test_a_map_with_a_middle_has_two_colours() -> None:
    def colours(values: list[list[float]]) -> set[str]:
        picture = plots.heat_map(values, ["0"], ["q", "k"], label="weight", middle=0.5)
        return {found.lower() for found in re.findall(r"fill: (#\w+)", picture)}

    both, high = colours([[0.4, 0.6]]), colours([[0.5, 0.6]])
    assert len(both & {plots.ACCENT, plots.OTHER}) == 2 and plots.OTHER not in high - both
