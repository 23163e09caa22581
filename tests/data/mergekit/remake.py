"""Runs every recipe of this directory through mergekit and keeps what comes out. From the repository's root:

    .cache/mergekit-venv/bin/python tests/data/mergekit/remake.py [RECIPE...]

Writes `outputs.safetensors` (`recipe:tensor`) and `versions.json`. Needs mergekit 0.1.5 and nothing of graftkit.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

import yaml  # noqa: E402
from mergekit.config import MergeConfiguration  # noqa: E402
from mergekit.merge import run_merge  # noqa: E402
from mergekit.options import MergeOptions  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import mergekit_models  # noqa: E402

KEPT = ("num_hidden_layers", "vocab_size", "dtype")


def main(wanted: list[str]) -> None:
    outputs = load_file(HERE / "outputs.safetensors") if wanted else {}
    told = json.loads((HERE / "versions.json").read_text()) if wanted else {"recipes": {}}
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(mergekit_models.save(Path(scratch)))
        for recipe in sorted(HERE.glob("*.yaml")):
            if not wanted or recipe.stem in wanted:
                merged, told["recipes"][recipe.stem] = merge(recipe)
                outputs = {n: v for n, v in outputs.items() if n.partition(":")[0] != recipe.stem}
                outputs |= {f"{recipe.stem}:{name}": value for name, value in merged.items()}
    packages = ("mergekit", "transformers", "torch", "peft", "numpy", "tokenizers")
    told |= {"models": mergekit_models.digest(), "versions": {name: version(name) for name in packages}}
    save_file(outputs, HERE / "outputs.safetensors")
    (HERE / "versions.json").write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")


def merge(recipe: Path) -> tuple[dict, dict]:
    """The tensors that mergekit makes, and what its config and tokenizer say."""
    print(recipe.stem, flush=True)
    config = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text()))
    shutil.rmtree("out", ignore_errors=True)
    run_merge(config, "out", MergeOptions(lora_merge_cache="cache", random_seed=0, quiet=True, write_model_card=False))
    made = json.loads(Path("out/config.json").read_text())
    return load_file("out/model.safetensors"), {key: made[key] for key in KEPT} | {"tokens": tokens()}


def tokens() -> list[str]:
    """The output's tokens in the order of their ids."""
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained("out").get_vocab()
    return sorted(vocabulary, key=vocabulary.get)


main(sys.argv[1:])
