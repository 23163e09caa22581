"""Passes kept as machine code: found again without numba, made anew where they are broken, changed or not ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from graftkit.compiling import Loop, compiled
from graftkit.execution import blending, counting
from graftkit.execution.machine_code import ARGUMENTS, Pass, compile_pass, key_of

STEP = 2


@compiled
def twice(value):
    return STEP * value


@compiled
def doubled(raws, numbers, words, out, sums, wide, single):
    for i in range(numbers.size):
        sums[i] = twice(numbers[i])


@compiled
def allocating(raws, numbers, words, out, sums, wide, single):
    sums[:] = np.zeros(sums.size)


def arrays(numbers: list[float]) -> list[np.ndarray]:
    made = [np.zeros(3, kind) for kind in ARGUMENTS]
    return [made[0].reshape(1, 3), np.array(numbers), *made[2:]]


def run(made: Pass, numbers: list[float]) -> list[float]:
    given = arrays(numbers)
    made(*given)
    return given[4].tolist()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAFTKIT_CACHE", str(tmp_path))
    return tmp_path / "passes"


def test_a_pass_is_kept_and_found_again(cache: Path) -> None:
    assert run(Pass(doubled), [1.0, 2.0, 3.0]) == [2.0, 4.0, 6.0]
    (file,) = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700
    before = file.stat().st_mtime_ns
    assert run(Pass(doubled), [4.0]) == [8.0, 0.0, 0.0]
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", [b"", b"\x00" * 10, b"\xff" * 5000])
def test_a_broken_file_is_made_anew(cache: Path, damage: bytes) -> None:
    run(Pass(doubled), [1.0])
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage)
    assert run(Pass(doubled), [5.0])[0] == 10.0
    assert len(file.read_bytes()) == len(whole)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # one bit
    assert run(Pass(doubled), [5.0])[0] == 10.0


def test_code_that_others_could_have_written_is_not_run(cache: Path) -> None:
    run(Pass(doubled), [1.0])
    (file,) = cache.iterdir()
    content = file.read_bytes()
    cache.chmod(0o777)
    file.write_bytes(b"theirs")
    assert run(Pass(doubled), [1.0])[0] == 2.0
    assert file.read_bytes() == b"theirs" != content


def test_a_directory_that_cannot_be_made_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAFTKIT_CACHE", str(tmp_path / "file" / "deeper"))
    assert run(Pass(doubled), [1.0])[0] == 2.0


def test_the_name_changes_with_a_constant_and_with_what_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(doubled)
    monkeypatch.setattr(sys.modules[__name__], "STEP", 3)
    changed = key_of(doubled)
    monkeypatch.undo()
    assert key_of(doubled) == before != changed
    monkeypatch.setattr(sys.modules[__name__], "twice", Loop(lambda value: value + value, False))
    assert key_of(doubled) not in (before, changed)


@pytest.mark.parametrize("made", [blending.BLEND, blending.VOTE, counting.COUNT])
def test_the_passes_refer_to_nothing_outside(made: Pass) -> None:
    assert compile_pass(made.loop)


def test_a_pass_that_allocates_is_refused(cache: Path) -> None:
    with pytest.raises(AssertionError, match="allocating needs"):
        compile_pass(allocating)


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "dare"])
def test_a_merge_that_finds_its_passes_does_without_numba(tmp_path: Path, method: str) -> None:
    import tiny

    base, math, code = tiny.family(tmp_path)
    recipe = {"method": method, "models": [str(math), str(code)]} | ({} if method == "average" else {"base": str(base)})
    program = f"import sys, graftkit; graftkit.merge({recipe!r}, sys.argv[1]); print('numba' in sys.modules)"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for place in ("first", "second"):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / place)],
            capture_output=True, text=True, check=True, env=environment,
        )  # fmt: skip
    assert done.stdout.split()[-1] == "False"
