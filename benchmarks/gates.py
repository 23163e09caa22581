"""What gates cost: solving beside forward passes alone, a step of training beside one of LoRA, a merge beside a sum.

    OMP_NUM_THREADS=1 python benchmarks/gates.py solve train merge --rounds 3

CPU seconds of one thread, in turn, medians and ranges over rounds; of the orchard's math and languages adapters, and
`solve-full` of its two full experts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch

from graftkit.data.tasks import Task, load_task, sample
from graftkit.execution.local import merge
from graftkit.improving.gated import deltas_of, gated
from graftkit.improving.learnable import Form, learnable
from graftkit.improving.learning import Example, step_loss
from graftkit.improving.training import running
from graftkit.measuring.activations import run
from graftkit.measuring.encoding import encode
from graftkit.measuring.responses import measure
from graftkit.measuring.scoring import Scorer
from graftkit.recipes.recipe import Recipe
from harness import seconds_in_turn

ROOT = Path(__file__).resolve().parents[1]
BASE, ADAPTERS = ROOT / ".cache" / "smollm2", ROOT / "examples" / "orchard" / "adapters"
FULL = ROOT / ".cache" / "orchard"
Work = Callable[[], object]


def recipe(method: str, *, full: bool = False, **more: object) -> Recipe:
    """The two experts by a method; `full`: those of the orchard that are no adapters."""
    places = [FULL / f"{name}-full" for name in ("math", "medicine")] if full else []
    models = [{"model": str(place)} for place in places or [ADAPTERS / name for name in ("math", "languages")]]
    told = {"method": method, "base": str(BASE), "models": models, "accept_base": True, "output": {"dtype": "float32"}}
    return Recipe.model_validate({**told, **more})


def tasks(count: int) -> list[Task]:
    """Examples of both domains."""
    return [sample(load_task(ROOT / f"examples/orchard/tasks/{name}.yaml"), count) for name in ("math", "languages")]


def in_turn(works: dict[str, Work], rounds: int) -> None:
    """Runs all in turn, after once without counting, and tells seconds and the ratio to the first."""
    spent = seconds_in_turn(works, rounds)
    first = next(iter(spent.values()))
    for name, own in spent.items():
        ratios = [one / other for one, other in zip(own, first, strict=True)]
        told = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        print(f"{name:34} {statistics.median(own):8.2f} s CPU   ratio {told}", flush=True)


def solving(rounds: int, full: bool = False) -> None:
    """One expert's forward passes over its examples, alone and while moments are taken."""
    asked = gated(recipe("graft_convex", full=full))
    deltas = {step.key: deltas_of(asked, step, "cpu") for step in asked.steps}
    with asked.live(asked.models[0], "cpu") as (live, tokenizer):
        rows = encode(tokenizer, tasks(6)[0])
        plain: Work = lambda: run(live, rows, [], batch_tokens=2048)  # noqa: E731
        in_turn(
            {"forward passes": plain, "with moments": lambda: measure(live, rows, deltas, batch_tokens=2048)}, rounds
        )


def training(rounds: int) -> None:
    """A step of four examples: of a LoRA adapter of rank 8 on the seven projections, and of gates of two adapters."""
    import peft
    from transformers import AutoModelForCausalLM

    made = learnable(gated(recipe("graft")), Form(), "cpu")
    with running(made, "cpu") as (live, tokenizer, _):
        rows = [row for task in tasks(2) for row in encode(tokenizer, task)]
        batch = [[Example(row, k // 2) for k, row in enumerate(rows)]]
        other = torch.optim.Adam(made.gating.parameters(), lr=0.01)
        plain = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        wrapped = peft.get_peft_model(plain, config)
        own = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-6)

        def step(model: Any, optimiser: Any) -> None:
            step_loss(Scorer(model, True), batch)
            optimiser.step()
            optimiser.zero_grad()

        lora = partial(step, wrapped.get_base_model(), own)
        in_turn({"a LoRA step": lora, "a step of gates": partial(step, live, other)}, rounds)


def merging(rounds: int) -> None:
    """Whole merges to files, with one worker: the sum, and the same models by given gates."""
    import numpy as np

    from graftkit.improving.gated import write

    with tempfile.TemporaryDirectory() as place:
        asked = gated(recipe("graft"))
        values = {step.key: np.full((2, step.shape[0]), 0.5, np.float32) for step in asked.steps}
        write(asked, Path(place) / "gates", values, "weight")
        gates = str(Path(place) / "gates" / "gates.safetensors")
        works: dict[str, Work] = {}
        for method in ("task_arithmetic", "graft_convex", "graft_free", "graft"):
            own = recipe(method, **({"gates": gates} if method != "task_arithmetic" else {}))
            works[method] = lambda own=own: merge(own, Path(place) / "out", workers=1, overwrite=True)
        in_turn(works, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", choices=("solve", "solve-full", "train", "merge"))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    works = {"solve": solving, "solve-full": partial(solving, full=True), "train": training, "merge": merging}
    for name in arguments.what:
        works[name](arguments.rounds)


if __name__ == "__main__":
    main()
