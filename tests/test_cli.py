"""The program, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import ANY

import pytest

import tiny


def graft(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from graftkit.cli import main; main()"]
    return subprocess.run(
        [*program, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("family")
    tiny.family(root)
    tiny.recipe(
        root, "method: ties\nbase: base\nmodels:\n  - {model: math, weight: 0.6}\n  - {model: code, weight: 0.4}\n"
    )
    return root


def test_merge_then_refuse_then_overwrite(family: Path, tmp_path: Path) -> None:
    done = graft("merge", family / "recipe.yaml", tmp_path / "out")
    assert done.returncode == 0 and "20 tensors merged by ties" in done.stdout, done.stderr
    again = graft("merge", family / "recipe.yaml", tmp_path / "out")
    assert again.returncode == 2 and again.stderr.startswith("graft: ") and "--overwrite" in again.stderr
    assert len(again.stderr.splitlines()) == 1 and "Traceback" not in again.stderr
    record = json.loads(graft("merge", family / "recipe.yaml", tmp_path / "out", "--overwrite", "--json").stdout)
    assert record == json.loads((tmp_path / "out" / "graft.json").read_text())


def test_a_user_error_is_one_sentence_and_status_two(tmp_path: Path) -> None:
    path = tiny.recipe(tmp_path, "method: ties\nbase: base\nmodels: [a]\ndensitty: 1\n")
    done = graft("explain", path)
    assert done.returncode == 2 and "unknown key 'densitty'" in done.stderr and len(done.stderr.splitlines()) == 1


def test_explain_reads_headers_only(family: Path) -> None:
    done = graft("explain", family / "recipe.yaml")
    assert done.returncode == 0 and "ties: 20 tensors" in done.stdout and "weight [0.6, 0.4]" in done.stdout
    told = json.loads(graft("explain", family / "recipe.yaml", "--json").stdout)
    assert told["output"]["parameters"] == sum(t["shape"][0] * (t["shape"] + [1])[1] for t in told["tensors"])


@pytest.mark.parametrize("arguments", [["--help"], ["explain", "RECIPE"], ["methods"], ["merge", "--help"]])
def test_light_commands_import_neither_torch_nor_transformers_nor_numba(family: Path, arguments: list[str]) -> None:
    line = [str(family / "recipe.yaml") if a == "RECIPE" else a for a in arguments]
    program = (
        f"import sys; sys.argv = ['graft', *{line!r}]\n"
        "from graftkit.cli import main\n"
        "try:\n    main()\nexcept SystemExit: pass\n"
        "bad = {'torch', 'transformers', 'numba', 'numpy', 'huggingface_hub'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60)


def test_the_hot_path_does_without_torch(family: Path, tmp_path: Path) -> None:
    program = (
        f"import sys, graftkit; graftkit.merge({str(family / 'recipe.yaml')!r}, {str(tmp_path / 'out')!r})\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_methods_are_listed_and_explained() -> None:
    assert "task_arithmetic" in graft("methods").stdout
    page = graft("methods", "dare").stdout
    assert "| `density` | 0.5 | number in [0, 1], one or one per model |" in page and "## Deviations" in page
    assert "did you mean 'dare'" in graft("methods", "dear").stderr
    told = {entry["name"]: entry for entry in json.loads(graft("methods", "--json").stdout)}
    assert told["ties"]["knobs"][1] == {"name": "density", "accepts": ANY, "default": 0.2} and "finish.svc" in told


def test_version() -> None:
    assert graft("--version").stdout.startswith("graftkit 0.")
