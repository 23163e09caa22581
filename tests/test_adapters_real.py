"""The committed experts of SmolLM2 merged into an adapter, run by PEFT (`make model`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graftkit

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".cache" / "smollm2"
MATH, CODE = (str(ROOT / "examples" / "orchard" / "adapters" / name) for name in ("math", "code"))

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="no .cache/smollm2; run `make model`"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT on transformers 5
]
RECIPE: dict[str, Any] = {
    "method": "task_arithmetic",
    "accept_base": True,
    "models": [{"model": MATH, "weight": 0.7}, {"model": CODE, "weight": 0.6}],
}


def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def test_two_experts_as_one_adapter_give_the_dense_merges_logits(tmp_path: Path) -> None:
    """Exact, and at the same rank by their core; PEFT's logits are those of the dense model but for rounding."""
    peft = pytest.importorskip("peft")
    from transformers import AutoTokenizer

    graftkit.merge(RECIPE | {"base": str(MODEL), "output": {"dtype": "float32"}}, tmp_path / "dense")
    tokens = AutoTokenizer.from_pretrained(MODEL)("A box holds 12 pencils.", return_tensors="pt")
    with torch.inference_mode():
        wanted, base = load(tmp_path / "dense")(**tokens).logits, load(MODEL)(**tokens).logits
        for name, rank in (("exact", "exact"), ("core", 16)):
            record = graftkit.merge(RECIPE | {"output": {"as": "adapter", "rank": rank}}, tmp_path / name)
            assert {t["rank"] for t in record["tensors"]} == {16} and len(record["tensors"]) == 210
            found = peft.PeftModel.from_pretrained(load(MODEL), tmp_path / name)(**tokens).logits
            assert (found - wanted).abs().max() < 2e-4 < 0.1 < (base - wanted).abs().max()
