"""Broken, unusual and hostile weights on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import graftkit
import tiny
from graftkit.checkpoints import sources
from graftkit.checkpoints.adapters import open_adapter
from graftkit.checkpoints.headers import read_header
from graftkit.checkpoints.sources import fingerprint, open_checkpoint
from graftkit.errors import CheckpointError, GraftError, PlanError

INDEX = "model.safetensors.index.json"


def average(*models: Path) -> dict:
    return {"method": "average", "models": list(map(str, models))}


def test_a_header_tells_what_the_library_tells(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = tiny.save(tmp_path / "m", tiny.weights(0) | {"scalar": torch.tensor(1.0), "empty": torch.zeros(0, 4)})
    tensors, metadata = read_header(path / "model.safetensors")
    with safe_open(path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(tensors) and metadata == file.metadata()
        for name, info in tensors.items():
            assert tuple(file.get_slice(name).get_shape()) == info.shape
    assert tensors["scalar"].elements == 1 and tensors["empty"].elements == 0


@pytest.mark.parametrize("keep", [0, 5, 100, 5000, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, keep: int) -> None:
    file = tiny.save(tmp_path / "m", tiny.weights(0)) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*(truncated|not JSON)"):
        open_checkpoint(tmp_path / "m")


def rewrite_header(file: Path, change: object) -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)  # type: ignore[operator]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


NAME = "model.layers.0.mlp.up_proj.weight"
FAULTS = [
    (lambda h: h[NAME].update(data_offsets=[0, 24 * 16 * 2]), "overlaps|gap"),
    (lambda h: h[NAME].update(shape=[24, 15]), "cannot have"),
    (lambda h: h[NAME].update(shape=[-24, -16]), "malformed"),
    (lambda h: h[NAME].update(shape="no"), "malformed|cannot"),
    (lambda h: h[NAME].pop("dtype"), "malformed"),
    (lambda h: h[NAME].update(dtype="F4"), "dtype 'F4'"),
    (lambda h: h.pop(NAME), "gap|longer"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_a_malformed_header_is_refused(tmp_path: Path, change: object, message: str) -> None:
    file = tiny.save(tmp_path / "m", tiny.weights(0)) / "model.safetensors"
    rewrite_header(file, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "m")


def test_a_header_that_names_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    text = (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0\0\0")
    with pytest.raises(CheckpointError, match="names 'a' twice"):
        open_checkpoint(tmp_path)


def test_shards_missing_lying_or_leaving_the_directory_are_refused(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "m", tiny.weights(0), shards=3)
    index = json.loads((path / INDEX).read_text())

    def with_map(**changes: str) -> None:
        (path / INDEX).write_text(json.dumps(index | {"weight_map": index["weight_map"] | changes}))

    with_map(**{NAME: "../../etc/passwd"})
    with pytest.raises(CheckpointError, match="leaves the directory"):
        open_checkpoint(path)
    with_map(**{NAME: "/etc/passwd"})
    with pytest.raises(CheckpointError, match="leaves the directory"):
        open_checkpoint(path)
    with_map(nothing="model-00001-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="'nothing'.*does not hold it"):
        open_checkpoint(path)
    with_map()
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003.*missing"):
        open_checkpoint(path)


def test_an_index_that_leaves_out_a_tensor_is_refused(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "m", tiny.weights(0), shards=2)
    index = json.loads((path / INDEX).read_text())
    del index["weight_map"][NAME]
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="does not list tensor"):
        open_checkpoint(path)


def test_a_stale_index_beside_a_single_file_is_refused(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "m", tiny.weights(0), shards=2)
    save_file(tiny.weights(1), path / "model.safetensors")
    with pytest.raises(CheckpointError, match="stale"):
        open_checkpoint(path)


def test_an_empty_directory_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        open_checkpoint(tmp_path)


def test_a_missing_tensor_and_a_surplus_one_are_refused_by_name(tmp_path: Path) -> None:
    whole, part = tiny.weights(0), tiny.weights(1)
    del part[NAME]
    a, b = tiny.save(tmp_path / "a", whole), tiny.save(tmp_path / "b", part)
    with pytest.raises(PlanError, match=f"model .*b' lacks the tensor '{NAME}'"):
        graftkit.plan(average(a, b))
    with pytest.raises(PlanError, match=f"has the tensor '{NAME}', for which the output has no place"):
        graftkit.plan(average(b, a))


def test_shapes_that_differ_are_refused_with_both(tmp_path: Path) -> None:
    other = tiny.weights(1) | {"model.embed_tokens.weight": torch.zeros(44, 16)}
    a, b = tiny.save(tmp_path / "a", tiny.weights(0)), tiny.save(tmp_path / "b", other)
    with pytest.raises(PlanError, match=r"\[44, 16\].*\[40, 16\].*vocabularies differ"):
        graftkit.plan(average(a, b))


def test_a_copied_output_embedding_of_a_tied_model_is_a_tie(tmp_path: Path) -> None:
    tied, copied = tiny.weights(0), tiny.weights(1)
    copied["lm_head.weight"] = copied["model.embed_tokens.weight"].clone()
    a, b = tiny.save(tmp_path / "a", tied), tiny.save(tmp_path / "b", copied)
    graftkit.merge(average(a, b), tmp_path / "ab")
    assert "lm_head.weight" not in load_file(tmp_path / "ab" / "model.safetensors")
    graftkit.merge(average(b, a), tmp_path / "ba")
    out = load_file(tmp_path / "ba" / "model.safetensors")
    assert torch.equal(out["lm_head.weight"], out["model.embed_tokens.weight"])


def test_an_untied_output_embedding_is_not_dropped(tmp_path: Path) -> None:
    untied = tiny.weights(1) | {"lm_head.weight": torch.ones(40, 16)}
    a = tiny.save(tmp_path / "a", tiny.weights(0))
    b = tiny.save(tmp_path / "b", untied, config={"tie_word_embeddings": False})
    with pytest.raises(PlanError, match="lm_head"):
        graftkit.plan(average(a, b))


def test_a_model_saved_without_its_head_is_matched_by_its_prefix(tmp_path: Path) -> None:
    bare = {name.removeprefix("model."): tensor for name, tensor in tiny.weights(1).items()}
    a, b = tiny.save(tmp_path / "a", tiny.weights(0)), tiny.save(tmp_path / "b", bare)
    graftkit.merge(average(a, b), tmp_path / "ab")
    graftkit.merge(average(b, a), tmp_path / "ba")
    ab, ba = (load_file(tmp_path / n / "model.safetensors") for n in ("ab", "ba"))
    assert set(ab) == set(tiny.shapes()) and all(torch.equal(ab["model." + n], t) for n, t in ba.items())


def test_fingerprints_are_of_content(tmp_path: Path) -> None:
    a, b = (open_checkpoint(tiny.save(tmp_path / n, tiny.weights(0))) for n in "ab")
    assert a.fingerprint() == b.fingerprint()
    changed = tiny.weights(0)
    changed["model.norm.weight"][0] += 1
    assert fingerprint(open_checkpoint(tiny.save(tmp_path / "c", changed)).files) != a.fingerprint()


ADAPTERS = [
    ({"peft_type": "IA3"}, "adapter of type 'IA3'"),
    ({"use_dora": True}, "lora_magnitude_vector"),
    ({"lora_bias": True}, "lora_bias"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    ({"init_lora_weights": "lora_ga"}, "started as 'lora_ga', so it belongs to a changed base"),
    ({"kasa_config": {"beta": 1e-4}}, "uses kasa_config"),
]


@pytest.mark.parametrize(("config", "message"), ADAPTERS)
def test_adapters_whose_delta_is_something_else_are_refused(tmp_path: Path, config: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_adapter(tiny.adapter(tmp_path / "lora", 0, **config))


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"alpha_pattern": {"0.self_attn.q_proj": 2}}, 0.5),
    ],
)
def test_the_scale_is_pefts(tmp_path: Path, config: dict, scale: float) -> None:
    factors = open_adapter(tiny.adapter(tmp_path / "lora", 0, **config)).factors
    assert factors["model.layers.0.self_attn.q_proj.weight"].scale == pytest.approx(scale)


def test_an_adapter_of_another_base_needs_to_be_accepted(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", tiny.weights(0))
    lora = tiny.adapter(tmp_path / "lora", 0, base_model_name_or_path="someone/else")
    recipe = {"method": "task_arithmetic", "base": str(base), "models": [str(lora)]}
    with pytest.raises(PlanError, match="trained on 'someone/else'.*accept_base"):
        graftkit.plan(recipe)
    assert graftkit.plan(recipe | {"accept_base": True}).notes


def test_an_adapter_that_does_not_fit_is_refused_even_when_accepted(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", tiny.weights(0))
    lora = tiny.adapter(tmp_path / "lora", 0)
    tensors = {n.replace("layers.1.", "layers.9."): t for n, t in load_file(lora / "adapter_model.safetensors").items()}
    save_file(tensors, lora / "adapter_model.safetensors")
    with pytest.raises(PlanError, match="layers.9.*is not in the output's model"):
        graftkit.plan({"method": "task_arithmetic", "base": str(base), "models": [str(lora)], "accept_base": True})


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT on transformers 5
def test_peft_reads_the_adapter_as_we_do(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = tiny.save(tmp_path / "base", tiny.weights(0, dtype=torch.float32), config={"dtype": "float32"})
    lora = tiny.adapter(
        tmp_path / "lora",
        3,
        rank=3,
        targets=("q_proj", "v_proj", "up_proj"),
        use_rslora=True,
        alpha_pattern={"up_proj": 5},
    )
    graftkit.merge({"method": "task_arithmetic", "base": str(base), "models": [str(lora)]}, tmp_path / "out")
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora).merge_and_unload()
    ours = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if name in ours:
            assert torch.allclose(tensor, ours[name], atol=1e-6), name


def test_pickles_are_refused_with_the_flag_that_reads_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(GraftError, match="--allow-pickle"):
        open_checkpoint(tmp_path)


def test_a_hub_id_is_served_from_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    snapshot = tmp_path / "hub" / "models--tiny--model" / "snapshots" / "abc"
    tiny.save(snapshot, tiny.weights(0))
    refs = tmp_path / "hub" / "models--tiny--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert graftkit.plan({"method": "passthrough", "models": ["tiny/model"]}).sources[0].name == "tiny/model"


@pytest.mark.parametrize("small", [0, 1 << 30])
def test_a_fingerprint_sees_a_change_of_any_one_tensor(tmp_path, monkeypatch, small):
    """Whole small files, and the middles of a large one's tensors."""
    monkeypatch.setattr(sources, "SMALL", small)
    monkeypatch.setattr(sources, "SAMPLE_BYTES", 1)
    weights = tiny.weights(0)
    seen = {sources.open_checkpoint(tiny.save(tmp_path / "as-is", weights, shards=2)).fingerprint()}
    for k, name in enumerate(weights):
        changed = {**weights, name: weights[name] + 0.01}
        seen.add(sources.open_checkpoint(tiny.save(tmp_path / str(k), changed, shards=2)).fingerprint())
    assert len(seen) == len(weights) + 1
    again = sources.open_checkpoint(tiny.save(tmp_path / "again", weights, shards=2)).fingerprint()
    assert again in seen
