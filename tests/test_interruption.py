"""Killed, failing and competing runs: the final name is absent or whole, and the same command goes on."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import graftkit
import tiny
from graftkit.checkpoints.sink import JOURNAL, Sink
from graftkit.errors import OutputError

LAYOUT = [("a.safetensors", [("one", "F32", (2, 3)), ("two", "BF16", (4,))]), ("b.safetensors", [("three", "F32", ())])]

KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
import graftkit
recipe, out = json.loads(sys.argv[1]), Path(sys.argv[2])
started = time.perf_counter()
graftkit.merge(recipe, out.with_name("reference"), workers=2)
length = time.perf_counter() - started
started = time.perf_counter()
graftkit.merge(recipe, out.with_name("again"), workers=2)
length = time.perf_counter() - started
rng, resumed, killed = random.Random(0), 0, 0
for _ in range(20):
    child = os.fork()
    if child == 0:
        graftkit.merge(recipe, out, workers=2, overwrite=True)
        os._exit(0)
    time.sleep(rng.uniform(0, length))
    os.kill(child, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    journal = out.with_name(f".{out.name}.graft-partial") / "graft-journal.jsonl"
    resumed += journal.is_file() and len(journal.read_text().splitlines()) > 1
    whole = not out.exists() or (out / "graft.json").is_file()
    wanted = out.with_name("reference").joinpath("model.safetensors").read_bytes()
    same = not out.exists() or (out / "model.safetensors").read_bytes() == wanted
    assert whole and same, "half an output under the final name"
record = graftkit.merge(recipe, out, workers=2, overwrite=True)
assert (out / "model.safetensors").read_bytes() == out.with_name("reference").joinpath("model.safetensors").read_bytes()
print(json.dumps({"killed": killed, "resumed": resumed}))
"""


def large(seed: int, near: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for k in range(40):
        noise = torch.randn(700, 700, generator=generator)
        made[f"model.layers.{k}.mlp.up_proj.weight"] = (
            near[f"model.layers.{k}.mlp.up_proj.weight"].float() + 0.01 * noise if near else noise
        ).bfloat16()
    return made


def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    base = large(0)
    paths = [
        tiny.save(tmp_path / "base", base),
        tiny.save(tmp_path / "math", large(1, base)),
        tiny.save(tmp_path / "code", large(2, base)),
    ]
    recipe = {"method": "ties", "base": str(paths[0]), "models": [str(paths[1]), str(paths[2])]}
    command = [sys.executable, "-c", KILLER, json.dumps(recipe), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["killed"] >= 10 and told["resumed"] >= 5
    assert not list(tmp_path.glob(".out*"))


def filled(sink: Sink, names: tuple[str, ...] = ("one", "two", "three")) -> Sink:
    sizes = {"one": 24, "two": 8, "three": 4}
    for name in names:
        sink.write(name, 0, bytes([7] * sizes[name]))
        sink.finish(name, {"method": name})
    return sink


def test_an_interrupted_output_goes_on_with_what_was_finished(tmp_path: Path) -> None:
    filled(Sink(tmp_path / "out", LAYOUT, "plan"), ("one",)).close()
    assert not (tmp_path / "out").exists()
    sink = Sink(tmp_path / "out", LAYOUT, "plan")
    assert sink.done == {"one": {"method": "one"}}
    filled(sink, ("two", "three")).complete()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "a.safetensors",
        "b.safetensors",
        "model.safetensors.index.json",
    ]


def test_another_plan_starts_anew(tmp_path: Path) -> None:
    filled(Sink(tmp_path / "out", LAYOUT, "plan"), ("one",)).close()
    sink = Sink(tmp_path / "out", LAYOUT, "other")
    assert sink.done == {}
    sink.close()


def test_a_journal_line_cut_short_does_not_count_and_does_not_stay(tmp_path: Path) -> None:
    filled(Sink(tmp_path / "out", LAYOUT, "plan"), ("one",)).close()
    journal = tmp_path / ".out.graft-partial" / JOURNAL
    journal.write_text(journal.read_text() + '{"tensor": "two", "rec')
    sink = filled(Sink(tmp_path / "out", LAYOUT, "plan"), ("three",))
    sink.close()
    again = Sink(tmp_path / "out", LAYOUT, "plan")
    assert set(again.done) == {"one", "three"}
    again.close()


def test_a_power_cut_between_runs_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(Sink(tmp_path / "out", LAYOUT, "plan"), ("one",)).close()
    monkeypatch.setattr("graftkit.checkpoints.sink.boot_id", lambda: "another start of the machine")
    sink = Sink(tmp_path / "out", LAYOUT, "plan")
    assert sink.done == {}
    sink.close()


def test_two_writers_of_one_output_are_refused(tmp_path: Path) -> None:
    sink = Sink(tmp_path / "out", LAYOUT, "plan")
    with pytest.raises(OutputError, match="another process is writing it"):
        Sink(tmp_path / "out", LAYOUT, "plan")
    filled(sink).complete()


def test_an_output_with_a_hole_is_never_named(tmp_path: Path) -> None:
    sink = filled(Sink(tmp_path / "out", LAYOUT, "plan"), ("one", "two"))
    with pytest.raises(OutputError, match="never written"):
        sink.complete()
    sink.close()
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_and_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = tiny.family(tmp_path)
    recipe = {"method": "average", "models": [str(family[1]), str(family[2])]}
    real, calls = os.pwrite, []

    def full(*arguments: object) -> int:
        calls.append(1)
        if len(calls) > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="the disk is full.*goes on where it stopped"):
        graftkit.merge(recipe, tmp_path / "out", workers=1)
    monkeypatch.setattr(os, "pwrite", real)
    assert graftkit.merge(recipe, tmp_path / "out")["execution"]["resumed_steps"] > 0


def test_an_input_that_shrinks_while_it_is_read_is_said(tmp_path: Path) -> None:
    family = tiny.family(tmp_path)
    planned = graftkit.plan({"method": "average", "models": [str(family[1]), str(family[2])]})
    file = family[2] / "model.safetensors"
    os.truncate(file, file.stat().st_size - 500)
    with pytest.raises(graftkit.GraftError, match="truncated while being read"):
        graftkit.execute(planned, tmp_path / "out")


def test_a_resumed_run_with_changed_inputs_starts_anew(tmp_path: Path) -> None:
    family = tiny.family(tmp_path)
    recipe = {"method": "average", "models": [str(family[1]), str(family[2])]}
    planned = graftkit.plan(recipe)
    layout = [(s.file, [(t.name, t.dtype, t.shape) for t in s.steps]) for s in planned.shards]
    sink = Sink(tmp_path / "out", layout, planned.hash)
    for step in planned.steps[:3]:
        sink.finish(step.name, {})  # as if written, and wrong
    sink.close()
    tiny.save(family[1], tiny.weights(9))
    assert graftkit.merge(recipe, tmp_path / "out")["execution"]["resumed_steps"] == 0
