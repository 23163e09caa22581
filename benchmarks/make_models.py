"""Make a Qwen2-shaped triple (base, math, code) in bfloat16: random (seeded by tensor name), never zeros.

    python benchmarks/make_models.py 0.1B 0.5B 1.5B [--root .cache/bench] [--threads 1]

base ~ N(0, 0.02); each expert is base plus dense noise and a low-rank part, about one per cent of the base's spread
each (norms: one per cent of one, which bfloat16 can show). Memory is bounded by one block of rows: every block goes
straight to its place in the shards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import harness

MODELS = ("base", "math", "code")
SPREAD, CHANGE, RANK = 0.02, 0.01, 8
BLOCK, SHARD_BYTES, FORMAT = 1 << 22, 10**9, "2"


@dataclass(frozen=True)
class Size:
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int


SIZES = {
    "tiny": Size(64, 2, 160, 4, 2, 512),
    "0.1B": Size(640, 14, 2560, 10, 2, 32000),
    "0.5B": Size(896, 24, 4864, 14, 2, 151936),
    "1.5B": Size(1536, 28, 8960, 12, 2, 151936),
}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: the same in all three models."""

    name: str
    shape: tuple[int, ...]
    shard: int
    begin: int


def shapes(size: Size) -> Iterator[tuple[str, tuple[int, ...]]]:
    key_value = size.hidden // size.heads * size.kv_heads
    yield "model.embed_tokens.weight", (size.vocabulary, size.hidden)
    for i in range(size.layers):
        layer = f"model.layers.{i}."
        for name, out in (("q", size.hidden), ("k", key_value), ("v", key_value)):
            yield f"{layer}self_attn.{name}_proj.weight", (out, size.hidden)
            yield f"{layer}self_attn.{name}_proj.bias", (out,)
        yield f"{layer}self_attn.o_proj.weight", (size.hidden, size.hidden)
        for name in ("gate", "up"):
            yield f"{layer}mlp.{name}_proj.weight", (size.intermediate, size.hidden)
        yield f"{layer}mlp.down_proj.weight", (size.hidden, size.intermediate)
        yield f"{layer}input_layernorm.weight", (size.hidden,)
        yield f"{layer}post_attention_layernorm.weight", (size.hidden,)
    yield "model.norm.weight", (size.hidden,)


def places(size: Size) -> list[Place]:
    """Fill shards of at most 1 GB, and of at most a third of the model, so that every size has several."""
    limit = min(SHARD_BYTES, sum(2 * math.prod(shape) for _, shape in shapes(size)) // 3 + 1)
    found, shard, used = [], 0, 0
    for name, shape in shapes(size):
        nbytes = 2 * math.prod(shape)
        if used and used + nbytes > limit:
            shard, used = shard + 1, 0
        found.append(Place(name, shape, shard, used))
        used += nbytes
    return found


def generator(*words: object) -> np.random.Generator:
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even, as uint16."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def base_block(place: Place, start: int, count: int) -> np.ndarray:
    values = SPREAD * generator("base", place.name, start).standard_normal((count, *place.shape[1:]), np.float32)
    values[values == 0] = SPREAD
    return to_bfloat16(values + 1 if "norm" in place.name else values)


def change_block(place: Place, model: str, start: int, count: int) -> np.ndarray:
    """Dense noise, and for matrices a low-rank part of the same size."""
    scale = np.float32(CHANGE if "norm" in place.name else SPREAD * CHANGE)
    change = scale * generator(model, place.name, start).standard_normal((count, *place.shape[1:]), np.float32)
    if len(place.shape) == 2:
        left = generator(model, place.name, start, "left").standard_normal((count, RANK), np.float32)
        right = generator(model, place.name, "right").standard_normal((RANK, place.shape[1]), np.float32)
        change += scale / np.float32(RANK) ** 0.5 * (left @ right)
    return change


def fill(place: Place, files: list[list[int]], offsets: list[int], start: int, count: int) -> None:
    """Write rows [start, start + count) of one tensor into the three models."""
    at = offsets[place.shard] + place.begin + 2 * start * math.prod(place.shape[1:])
    base = base_block(place, start, count)
    blocks = [base] + [to_bfloat16(from_bfloat16(base) + change_block(place, m, start, count)) for m in MODELS[1:]]
    for model_files, block in zip(files, blocks, strict=True):
        os.pwrite(model_files[place.shard], block.tobytes(), at)


def blocks(place: Place) -> Iterator[tuple[int, int]]:
    rows = place.shape[0]
    step = max(1, BLOCK // math.prod(place.shape[1:]))
    return ((start, min(step, rows - start)) for start in range(0, rows, step))


def header(tensors: list[Place]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for t in tensors:
        ends = [t.begin, t.begin + 2 * math.prod(t.shape)]
        entries[t.name] = {"dtype": "BF16", "shape": t.shape, "data_offsets": ends}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shard_name(shard: int, count: int) -> str:
    return f"model-{shard + 1:05d}-of-{count:05d}.safetensors"


def write_weights(root: Path, size: Size, threads: int) -> None:
    tensors = places(size)
    count = tensors[-1].shard + 1
    headers = [header([t for t in tensors if t.shard == shard]) for shard in range(count)]
    offsets = [len(h) for h in headers]
    paths = [[root / model / shard_name(shard, count) for shard in range(count)] for model in MODELS]
    files = [[os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644) for path in row] for row in paths]
    for row in files:
        for file, head in zip(row, headers, strict=True):
            os.pwrite(file, head, 0)
    with ThreadPoolExecutor(threads) as pool:
        tasks = [pool.submit(fill, t, files, offsets, *rows) for t in tensors for rows in blocks(t)]
        for task in tasks:
            task.result()
    for row in files:
        for file in row:
            os.close(file)


def configuration(size: Size) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "intermediate_size": size.intermediate,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "vocab_size": size.vocabulary,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "initializer_range": SPREAD,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def tokenizer() -> str:
    """A small byte-level BPE tokenizer, trained on this file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(Path(__file__).read_text().splitlines(), trainer)
    return made.to_str()


def write_companions(folder: Path, size: Size, tokenizer_json: str) -> None:
    """Everything beside the shards; the index comes last and marks the model as complete."""
    tensors = places(size)
    total = sum(2 * math.prod(t.shape) for t in tensors)
    weights = {t.name: shard_name(t.shard, tensors[-1].shard + 1) for t in tensors}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 32768,
    }
    contents = {
        "config.json": configuration(size),
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 0, "do_sample": False},
        "tokenizer_config.json": settings,
        "model.safetensors.index.json": {"metadata": {"total_size": total, "made": FORMAT}, "weight_map": weights},
    }
    (folder / "tokenizer.json").write_text(tokenizer_json)
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")


def complete(folder: Path, size: Size) -> bool:
    """Whether the index is of this format and every shard has its full length."""
    index = folder / "model.safetensors.index.json"
    if not index.exists() or json.loads(index.read_text())["metadata"].get("made") != FORMAT:
        return False
    tensors = places(size)
    count = tensors[-1].shard + 1
    for shard in range(count):
        mine = [t for t in tensors if t.shard == shard]
        path = folder / shard_name(shard, count)
        length = len(header(mine)) + sum(2 * math.prod(t.shape) for t in mine)
        if not path.exists() or path.stat().st_size != length:
            return False
    return True


def make(name: str, root: Path, threads: int = 1) -> Path:
    """Make one triple under `root/name`, unless it is there already."""
    folder, size = root / name, SIZES[name]
    if all(complete(folder / model, size) for model in MODELS):
        return folder
    for model in MODELS:
        (folder / model).mkdir(parents=True, exist_ok=True)
        (folder / model / "model.safetensors.index.json").unlink(missing_ok=True)
    write_weights(folder, size, threads)
    text = tokenizer()
    for model in MODELS:
        write_companions(folder / model, size, text)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sizes", nargs="*", choices=list(SIZES), default=["0.1B"])
    parser.add_argument("--root", type=Path, default=harness.BENCH)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    for name in options.sizes:
        start = time.perf_counter()
        folder = make(name, options.root, options.threads)
        print(f"{name}: {folder} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
