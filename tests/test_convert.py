"""GGUF files become checkpoints: values, tokenizer, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from graftkit.checkpoints import gguf as converting
from graftkit.checkpoints.gguf import convert_gguf
from graftkit.checkpoints.headers import DTYPE_NAMES
from graftkit.checkpoints.sources import open_checkpoint
from graftkit.cli import app
from graftkit.errors import CheckpointError, GraftError, OutputError

HIDDEN, INNER, HEADS, KEYS, LAYERS = 32, 64, 4, 2, 2
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
SMOLLM2 = Path(__file__).parents[1] / ".cache" / "smollm2"


def vocabulary() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ["<|endoftext|>", *sorted(ByteLevel.alphabet()), "th", "the"]


def llama_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors by their names in transformers."""
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (len(vocabulary()), HIDDEN)}
    for n in range(LAYERS):
        head = f"model.layers.{n}."
        shapes |= {head + f"self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qo"}
        shapes |= {head + f"self_attn.{p}_proj.weight": (HIDDEN // HEADS * KEYS, HIDDEN) for p in "kv"}
        shapes |= {head + f"mlp.{p}_proj.weight": (INNER, HIDDEN) for p in ("gate", "up")}
        shapes |= {head + "mlp.down_proj.weight": (HIDDEN, INNER)}
        shapes |= {head + f"{p}_layernorm.weight": (HIDDEN,) for p in ("input", "post_attention")}
    shapes["model.norm.weight"] = (HIDDEN,)
    return {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "model.layers": "blk",
}  # fmt: skip


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order in which llama.cpp keeps the rows of queries and keys."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(
    path: Path, *, architecture: str = "llama", kind: str = "Q8_0", without: str = "", parts: int = 1
) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokens = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    for name, weight in llama_weights().items():
        if name != without:
            add_tensor(writer, name, weight, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensor(writer: Any, name: str, weight: np.ndarray, kind: str) -> None:
    import gguf

    heads = {"q_proj": HEADS, "k_proj": KEYS}.get(name.split(".")[-2])
    stored = permuted(weight, heads) if heads else weight
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    quantisation = gguf.GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
    writer.add_tensor(name, gguf.quants.quantize(stored, quantisation), raw_dtype=quantisation)


def expected(name: str, weight: np.ndarray, kind: str) -> torch.Tensor:
    """What the file holds of a tensor."""
    import gguf

    quantisation = gguf.GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight, quantisation), quantisation))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.mark.parametrize("dtype", converting.DTYPES)
def test_a_quantised_llama_becomes_a_checkpoint_with_the_values_of_the_file(
    source: Path, tmp_path: Path, dtype: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = convert_gguf(source, tmp_path / "out", dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values())
    held = model.state_dict()
    for name, weight in llama_weights().items():
        assert torch.equal(held[name], expected(name, weight, "Q8_0").to(getattr(torch, dtype))), name
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("the cat").input_ids[0] == vocabulary().index("the")
    assert tokenizer.decode(tokenizer("the cat").input_ids) == "the cat"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] and config["dtype"] == dtype
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & set(config)
    assert {info.dtype for info in open_checkpoint(out).tensors.values()} == {DTYPE_NAMES[dtype]}


def test_the_command_says_what_it_made_and_refuses_to_write_over_it(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = CliRunner().invoke(app, ["convert", str(source), str(out), "--json"])
    assert made.exit_code == 0, made.output
    told = json.loads(made.stdout)
    assert (
        told["architecture"] == "LlamaForCausalLM" and told["chat_template"] and told["tensors"] == len(llama_weights())
    )
    with pytest.raises(OutputError, match="--overwrite"):
        convert_gguf(source, out)
    (out / "stale.safetensors").write_bytes(b"")
    convert_gguf(source, out, overwrite=True)
    assert not (out / "stale.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architecture": "bert"}, GraftError, r"bert is not supported.*knows: .*llama.*SmolLM2 \(llama\)"),
        ({"architecture": "graftnet"}, GraftError, r"graftnet is not supported.*knows: .*llama"),
        ({"without": "model.norm.weight"}, CheckpointError, r"gives no value for 1 tensors.*model.norm.weight"),
        ({"parts": 3}, CheckpointError, "one of 3 parts"),
    ],
)
def test_what_cannot_become_a_checkpoint_is_refused(tmp_path: Path, changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        convert_gguf(write_gguf(tmp_path / "tiny.gguf", **changes), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_files_that_are_not_whole_are_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, short = tmp_path / "other.gguf", tmp_path / "short.gguf"
    other.write_bytes(b"not a model")
    for length in (100, 3000, source.stat().st_size - 100):
        short.write_bytes(source.read_bytes()[:length])
        with pytest.raises(CheckpointError, match="truncated"):
            convert_gguf(short, tmp_path / "out")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        convert_gguf(other, tmp_path / "out")
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert_gguf(tmp_path / "absent.gguf", tmp_path / "out")
    with pytest.raises(GraftError, match="did you mean 'float16'"):
        convert_gguf(source, tmp_path / "out", "float61")
    monkeypatch.setattr(converting, "MARGIN", 1 << 60)
    with pytest.raises(OutputError, match="the disk has"):
        convert_gguf(source, tmp_path / "out")
    monkeypatch.setattr(converting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GraftError, match=r"graftkit\[gguf\]"):
        convert_gguf(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.real
@pytest.mark.skipif(not (SMOLLM2 / "config.json").is_file(), reason="made by `make model`")
def test_smollm2_as_it_was_converted_loads_without_a_missing_tensor() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, loading = AutoModelForCausalLM.from_pretrained(SMOLLM2, output_loading_info=True)
    assert not any(loading.values()) and model.num_parameters() == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    text = "The capital of Japan is 東京"
    assert tokenizer.chat_template and tokenizer.decode(tokenizer(text).input_ids) == text
