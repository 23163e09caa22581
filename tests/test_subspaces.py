"""What two adapters share: principal angles and projections, against numpy on the dense deltas."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import tiny
from graftkit.checkpoints.adapters import open_adapter
from graftkit.cli import app
from graftkit.errors import PlanError
from graftkit.measuring.subspaces import subspaces


def dense(directory: Path, name: str) -> np.ndarray:
    low_rank = open_adapter(directory).load(name, np.float64)
    return low_rank.left @ low_rank.right


def bases(delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    u, s, vt = np.linalg.svd(delta)
    rank = int((s > 1e-10 * s[0]).sum())
    return u[:, :rank], vt[:rank].T


def test_against_the_dense_deltas(tmp_path: Path) -> None:
    paths = [
        tiny.adapter(tmp_path / "one", 1, rank=3, use_rslora=True),
        tiny.adapter(tmp_path / "two", 2, rank=2, targets=("q_proj", "up_proj")),
    ]
    (found,) = subspaces(paths)
    assert found.models == ("one", "two") and found.alone == (2, 2) and set(found.roles) == {"attention"}
    total = np.zeros(3)
    for name, overlap in found.modules.items():
        one, two = (dense(path, name) for path in paths)
        (w1, r1), (w2, r2) = bases(one), bases(two)
        assert overlap.columns == pytest.approx(np.mean(np.linalg.svd(w1.T @ w2)[1] ** 2))
        assert overlap.rows == pytest.approx(np.mean(np.linalg.svd(r1.T @ r2)[1] ** 2))
        assert overlap.chance == pytest.approx((3 / one.shape[0], 3 / one.shape[1]))
        inside = np.linalg.norm(w2 @ w2.T @ one @ r2 @ r2.T) ** 2 / np.linalg.norm(one) ** 2
        assert overlap.inside[0] == pytest.approx(inside)
        assert overlap.cosine == pytest.approx(np.vdot(one, two) / np.linalg.norm(one) / np.linalg.norm(two))
        total += np.array([np.vdot(one, two), np.vdot(one, one), np.vdot(two, two)])
    assert found.total and found.total.cosine == pytest.approx(total[0] / np.sqrt(total[1] * total[2]))
    assert found.total.norms == pytest.approx(np.sqrt(total[1:]))


def related(one: Path, target: Path, change: Any) -> Path:
    """Another adapter, made from the first one's factors by name."""
    tiny.adapter(target, 1)
    made = {name: change(name, tensor) for name, tensor in load_file(one / "adapter_model.safetensors").items()}
    save_file(made, target / "adapter_model.safetensors")
    return target


def turned(name: str, tensor: np.ndarray) -> np.ndarray:
    """The same spaces, other directions in them: a permutation of A's rows against B's columns."""
    return np.ascontiguousarray(np.roll(tensor, 1, axis=0)) if "lora_A" in name else tensor


CASES = {
    "do largely the same": lambda name, tensor: tensor,
    "undo each other": lambda name, tensor: -tensor if "lora_A" in name else tensor,
    "share directions and differ": turned,
}


@pytest.mark.parametrize("verdict", CASES)
def test_the_verdict_of_related_adapters(tmp_path: Path, verdict: str) -> None:
    one = tiny.adapter(tmp_path / "one", 1, rank=4)
    (found,) = subspaces([one, related(one, tmp_path / "two", CASES[verdict])])
    assert found.total and verdict in found.verdict
    assert found.total.columns == pytest.approx(1) and found.total.inside == pytest.approx((1, 1))


def test_spaces_that_do_not_meet_are_benign(tmp_path: Path) -> None:
    one = tiny.adapter(tmp_path / "one", 1, rank=2)

    def apart(half: int) -> Any:
        def change(name: str, tensor: np.ndarray) -> np.ndarray:
            kept, axis = tensor.copy(), 1 if "lora_A" in name else 0
            size = tensor.shape[axis] // 2
            np.moveaxis(kept, axis, 0)[slice(0, size) if half else slice(size, None)] = 0
            return kept

        return change

    paths = [related(one, tmp_path / str(half), apart(half)) for half in (0, 1)]
    for path in paths:
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(config | {"r": 2, "lora_alpha": 4}))
    (found,) = subspaces(paths)
    assert found.total and found.total.columns == pytest.approx(0, abs=1e-12) and "likely to be benign" in found.verdict


def test_adapters_that_read_the_same_inputs_are_not_called_benign(tmp_path: Path) -> None:
    """As two that were trained from one seed do: their A hardly moved."""
    one, draw = tiny.adapter(tmp_path / "one", 1, rank=4), np.random.default_rng(0)
    other = related(one, tmp_path / "two", lambda name, t: t if "lora_A" in name else draw.normal(size=t.shape))
    (found,) = subspaces([one, other])
    assert found.total and found.total.rows == pytest.approx(1)
    told = replace(found, total=replace(found.total, inside=(0.02, 0.01), cosine=0.01)).verdict
    assert "benign" not in told and "read the same (100%" in told and "core_regmean" in told


def test_no_module_in_common_and_no_adapter(tmp_path: Path) -> None:
    one, two = tiny.adapter(tmp_path / "one", 1), tiny.adapter(tmp_path / "two", 2, targets=("up_proj",))
    (found,) = subspaces([one, two])
    assert found.total is None and "no module in common" in found.verdict
    with pytest.raises(PlanError, match="is no plain LoRA adapter"):
        subspaces([one, tiny.save(tmp_path / "base", tiny.weights(0))])


def test_the_command_says_it(tmp_path: Path) -> None:
    paths = [str(tiny.adapter(tmp_path / name, k)) for k, name in enumerate(("one", "two", "three"))]
    told = CliRunner().invoke(app, ["inspect", *paths])
    assert told.exit_code == 0, told.output
    assert "directions that adapters share" in told.output and told.output.count(" × ") >= 6
    found = json.loads(CliRunner().invoke(app, ["inspect", *paths, "--json"]).output)
    assert len(found["subspaces"]) == 3 and found["subspaces"][0]["verdict"]
