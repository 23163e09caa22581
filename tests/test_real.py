"""The committed experts on the real SmolLM2 (`make model`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import graftkit
import tiny

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".cache" / "smollm2"
MATH, CODE = (ROOT / "examples" / "orchard" / "adapters" / name for name in ("math", "code"))

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="no .cache/smollm2; run `make model`"),
]


def delta(adapter: Path, name: str) -> torch.Tensor:
    factors, module = (
        load_file(adapter / "adapter_model.safetensors"),
        "base_model.model." + name.removesuffix(".weight"),
    )
    return 2.0 * factors[f"{module}.lora_B.weight"].double() @ factors[f"{module}.lora_A.weight"].double()


def test_two_real_experts_become_the_float64_sum_rounded_once(tmp_path: Path) -> None:
    recipe, program = (
        ROOT / "examples" / "demo" / "task_arithmetic.yaml",
        "import graftkit, sys; graftkit.merge(*sys.argv[1:])",
    )
    alone = [sys.executable, "-c", program, str(recipe), str(tmp_path / "out")]  # its peak is that of no other test
    subprocess.run(alone, check=True, capture_output=True, timeout=300)
    record = json.loads((tmp_path / "out" / "graft.json").read_text())
    names = [
        f"model.layers.{n}.{part}.weight"
        for n, part in ((0, "self_attn.q_proj"), (17, "mlp.down_proj"), (29, "mlp.up_proj"))
    ]
    with (
        safe_open(tmp_path / "out" / "model.safetensors", "pt") as out,
        safe_open(MODEL / "model.safetensors", "pt") as base,
    ):
        for name in names:
            exact = base.get_tensor(name).double() + 0.7 * (delta(MATH, name) + delta(CODE, name))
            tiny.half_unit(out.get_tensor(name), exact)
    assert sum(1 for t in record["tensors"] if t["method"]) == 30 * 7
    assert record["execution"]["peak_memory_bytes"] < 4e9


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT on transformers 5
def test_one_expert_at_weight_one_gives_pefts_logits(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = {"method": "task_arithmetic", "base": str(MODEL), "accept_base": True, "models": [str(MATH)]}
    graftkit.merge(recipe, tmp_path / "out")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("A box holds 12 pencils.", return_tensors="pt")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), MATH)
    with torch.inference_mode():
        assert torch.allclose(merged(**tokens).logits, adapted(**tokens).logits, atol=2e-3)
