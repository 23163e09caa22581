"""Gates of the committed experts on the real SmolLM2 (`make model`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import graftkit
from graftkit.data.tasks import load_task, sample
from graftkit.execution.live import Live
from graftkit.improving.gated import gated
from graftkit.improving.learnable import Form, learnable
from graftkit.improving.learning import PRESETS
from graftkit.improving.training import running, train

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".cache" / "smollm2"
ADAPTERS = ROOT / "examples" / "orchard" / "adapters"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="no .cache/smollm2; run `make model`"),
]


def test_gates_of_real_experts_learn_and_merge_into_what_was_trained(tmp_path: Path) -> None:
    """Two steps; in the paper's cage of 0.41 to 0.59."""
    models = [str(ADAPTERS / name) for name in ("math", "languages")]
    told = {
        "method": "graft",
        "base": str(MODEL),
        "models": models,
        "accept_base": True,
        "output": {"dtype": "float32"},
    }
    recipe = graftkit.Recipe.model_validate(told)
    tasks = [sample(load_task(ROOT / f"examples/orchard/tasks/{name}.yaml"), 2) for name in ("math", "languages")]
    settings = replace(PRESETS["small"], steps=2, batch=2)
    found = train(recipe, tmp_path / "out", data=tasks, settings=settings, held_out=0, device="cpu")
    assert found.learnt == 2 * 210 and found.change.mean > 1e-4
    assert found.change.low > 0.41 and found.change.high < 0.59
    ids = torch.tensor([[1, 4093, 198, 1780, 314, 216, 22, 5]])
    made = learnable(gated(recipe), Form(), "cpu")
    made.gating.load_state_dict(load_file(tmp_path / "out" / "phi.safetensors"), strict=False)
    with running(made, "cpu") as (live, _, _), torch.no_grad():
        fused = live(input_ids=ids).logits
    with Live.open(found.recipe, workers=1) as merged, torch.no_grad():
        merged.apply()
        apart = (merged.model(input_ids=ids).logits - fused).abs().max()
    assert apart < 1e-3 * fused.abs().max()
