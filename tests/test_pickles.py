"""Pickle checkpoints: refused unless asked for, read without running code, merged like their safetensors twins."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graftkit
import tiny
from graftkit.checkpoints import pickles
from graftkit.checkpoints.pickles import converted
from graftkit.checkpoints.sources import open_checkpoint
from graftkit.errors import CheckpointError, OutputError
from graftkit.measuring.inspection import inspect


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAFTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pickled(directory: Path, tensors: Any, *, shards: int = 1, **options: Any) -> Path:
    """A checkpoint as transformers wrote it before safetensors."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(tiny.CONFIG))
    (directory / "tokenizer_config.json").write_text("{}")
    if shards == 1:
        torch.save(tensors, directory / "pytorch_model.bin", **options)
        return directory
    places = {}
    for k in range(shards):
        file = f"pytorch_model-{k + 1:05d}-of-{shards:05d}.bin"
        part = dict(list(tensors.items())[k::shards])
        torch.save(part, directory / file)
        places |= dict.fromkeys(part, file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return directory


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_pickle_merges_as_its_safetensors_twin(tmp_path: Path, shards: int) -> None:
    base, math, code = tiny.family(tmp_path)
    twin = pickled(tmp_path / "pickled", load_file(math / "model.safetensors"), shards=shards)
    recipe = {"method": "ties", "base": str(base), "models": [str(math), str(code)]}
    graftkit.merge(recipe, tmp_path / "plain")
    graftkit.merge(recipe | {"models": [str(twin), str(code)]}, tmp_path / "read", allow_pickle=True)
    one, two = (tmp_path / out / "model.safetensors" for out in ("plain", "read"))
    assert one.read_bytes() == two.read_bytes()
    assert inspect(twin, base, allow_pickle=True).changes[0].total == inspect(math, base).changes[0].total
    assert sorted(path.suffix for path in twin.iterdir()) == sorted([".json"] * (2 + (shards > 1)) + [".bin"] * shards)


def test_without_the_flag_a_pickle_is_refused_with_the_way_out(tmp_path: Path, cache: Path) -> None:
    base, math, _ = tiny.family(tmp_path)
    twin = pickled(tmp_path / "pickled", load_file(math / "model.safetensors"))
    with pytest.raises(CheckpointError, match="only pickle weights .* pass --allow-pickle"):
        graftkit.merge({"method": "average", "models": [str(base), str(twin)]}, tmp_path / "out")
    assert not cache.exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare", "module"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, cache: Path, kind: str) -> None:
    flag = tmp_path / "code-was-run"
    content = {"weight": torch.ones(3), "trap": Malicious(flag)}
    directory = pickled(tmp_path / "evil", {}, shards=1)
    file = directory / "pytorch_model.bin"
    if kind == "bare":
        file.write_bytes(pickle.dumps(content))
    elif kind == "module":
        torch.save(torch.nn.Linear(2, 2), file)
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match="weights-only loading refuses it: it holds more than tensors") as refusal:
        graftkit.merge({"method": "average", "models": [str(directory)] * 2}, tmp_path / "out", allow_pickle=True)
    told, culprit = str(refusal.value), {"bare": "", "module": "linear.Linear"}.get(kind, "posix.system")
    assert "\n" not in told and culprit in told
    assert not flag.exists() and not list((cache / "pickles").iterdir())
    pickle.loads(pickle.dumps(Malicious(flag)))
    assert flag.exists()  # the trap works


def test_tied_and_viewed_tensors_are_kept_once_each_with_their_values(tmp_path: Path, cache: Path) -> None:
    shared, large = torch.randn(6, 4), torch.randn(8, 5).to(torch.bfloat16)
    tensors = {
        "lm_head.weight": shared, "model.embed_tokens.weight": shared, "z.alias": large, "b.alias": large,
        "rows": large[2:5], "turned": large.T, "scalar": torch.tensor(2.5, dtype=torch.float64),
        "steps": torch.arange(3), "mask": torch.tensor([True, False]), "empty": torch.empty(0, 3),
        "half": torch.ones(2).half(),
    }  # fmt: skip
    out = converted(pickled(tmp_path / "old", tensors), cache)
    kept = load_file(out / "model.safetensors")
    assert set(kept) == set(tensors) - {"lm_head.weight", "z.alias"}
    assert all(torch.equal(kept[name], tensors[name]) and kept[name].dtype == tensors[name].dtype for name in kept)
    assert json.loads((out / "config.json").read_text()) == tiny.CONFIG and (out / "tokenizer_config.json").is_file()


def test_the_conversion_is_kept_until_the_model_changes(tmp_path: Path, cache: Path) -> None:
    directory = pickled(tmp_path / "old", {"weight": torch.ones(3)})
    first = converted(directory, cache)
    before = (first / "model.safetensors").stat()
    assert converted(directory, cache) == first and (first / "model.safetensors").stat() == before
    torch.save({"weight": torch.zeros(4)}, directory / "pytorch_model.bin")
    second = converted(directory, cache)
    assert second != first and load_file(second / "model.safetensors")["weight"].shape == (4,)
    (directory / "tokenizer_config.json").write_text('{"changed": 1}')
    third = converted(directory, cache)
    assert (third / "tokenizer_config.json").read_text() == '{"changed": 1}'
    assert {path.name for path in (cache / "pickles").iterdir()} == {first.name, second.name, third.name}


def test_the_old_format_of_torch_is_read(tmp_path: Path, cache: Path) -> None:
    directory = pickled(tmp_path / "old", {"weight": torch.arange(4.0)}, _use_new_zipfile_serialization=False)
    assert open_checkpoint(converted(directory, cache)).tensors["weight"].shape == (4,)


def test_what_is_no_whole_checkpoint_is_refused(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"a": torch.ones(1000), "b": torch.ones(2)}
    made = {
        "nested": (pickled(tmp_path / "nested", {"state_dict": good}), "entry 'state_dict' is a dict"),
        "list": (pickled(tmp_path / "list", [torch.ones(2)]), "holds a list"),
        "complex": (pickled(tmp_path / "complex", {"c": torch.ones(2, dtype=torch.complex64)}), "cannot be kept"),
        "bomb": (pickled(tmp_path / "bomb", {"c": torch.ones(1).expand(1 << 40)}), "claims 4398046511104 bytes"),
        "cut": (pickled(tmp_path / "cut", good), "cannot be read"),
        "absent": (pickled(tmp_path / "absent", good, shards=2), "is missing"),
        "other": (pickled(tmp_path / "other", good, shards=2), "which does not hold it"),
        "out": (pickled(tmp_path / "out", good, shards=2), "leaves the directory"),
        "names": (pickled(tmp_path / "names", good), "neither pytorch_model.bin nor"),
    }
    cut = tmp_path / "cut" / "pytorch_model.bin"
    cut.write_bytes(cut.read_bytes()[:2000])
    (tmp_path / "absent" / "pytorch_model-00002-of-00002.bin").unlink()
    torch.save({"x": torch.ones(1)}, tmp_path / "other" / "pytorch_model-00002-of-00002.bin")
    (tmp_path / "out" / "pytorch_model.bin.index.json").write_text(
        '{"weight_map": {"a": "../names/pytorch_model.bin"}}'
    )
    (tmp_path / "names" / "pytorch_model.bin").rename(tmp_path / "names" / "weights.pt")
    for directory, message in made.values():
        with pytest.raises(CheckpointError, match=message):
            converted(directory, cache)
    monkeypatch.setattr(pickles, "MARGIN", 1 << 60)
    with pytest.raises(OutputError, match="GRAFTKIT_CACHE"):
        converted(pickled(tmp_path / "fine", good), cache)
    assert not list((cache / "pickles").iterdir())
