"""Merging two rank-16 adapters of a 7-billion-parameter model: graftkit beside PEFT's `add_weighted_adapter`.

    python benchmarks/adapters.py            # graftkit; with --check the difference from the dense sums too
    python benchmarks/adapters.py --cpu      # CPU seconds of floor and exact merge in turn: others may use the machine
    python benchmarks/adapters.py --peft     # PEFT's `svd`, one module of each shape, scaled (many minutes)

The adapters are of Llama-2-7B's shapes (q, k, v, o, gate, up, down; 32 layers), float32, as PEFT saves them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from harness import BENCH, GRAFT, RESULTS, measure

LAYERS, RANK = 32, 16
SHAPES = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), (4096, 4096)),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (11008, 4096)),
    "mlp.down_proj": (4096, 11008),
}
FOLDER = BENCH / "adapters"
MODELS = ("math", "code")
WEIGHTS = (0.7, 0.6)


def modules() -> dict[str, tuple[int, int]]:
    return {f"model.layers.{n}.{name}": shape for n in range(LAYERS) for name, shape in SHAPES.items()}


def make() -> None:
    """Two adapters of random factors, once."""
    import numpy as np
    from safetensors.numpy import save_file

    for seed, model in enumerate(MODELS):
        folder = FOLDER / model
        if (folder / "adapter_config.json").is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        draw, tensors = np.random.default_rng(seed), {}
        for module, (out, inner) in modules().items():
            for part, shape in (("A", (RANK, inner)), ("B", (out, RANK))):
                tensors[f"base_model.model.{module}.lora_{part}.weight"] = 0.01 * draw.standard_normal(shape, "f4")
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "base_model_name_or_path": "a/7B",
                  "target_modules": sorted({name.rpartition(".")[2] for name in SHAPES})}  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config))


def recipe(rank: Any) -> Path:
    models = [{"model": str(FOLDER / name), "weight": weight} for name, weight in zip(MODELS, WEIGHTS, strict=True)]
    path = FOLDER / f"{rank}.yaml"
    output = {"as": "adapter", "rank": rank}
    path.write_text(json.dumps({"method": "task_arithmetic", "models": models, "output": output}))
    return path


def ours(rank: Any, rounds: int, workers: int) -> dict[str, Any]:
    """Whole processes; `seconds` is from the first read to the last byte, without interpreter and imports."""
    found = []
    for _ in range(rounds):
        out = FOLDER / f"out-{rank}"
        done = measure([str(GRAFT), "merge", str(recipe(rank)), str(out), "--overwrite", "--workers", str(workers)])
        if not done.ok:
            sys.exit(done.log)
        run = json.loads((out / "graft.json").read_text())["execution"]
        found.append(
            {"wall": done.wall, "cpu": done.cpu, "seconds": run["seconds"], "peak": done.peak_rss, "load": done.load}
        )
    medians = {key: sorted(run[key] for run in found)[rounds // 2] for key in found[0]}
    return {"rank": rank, "workers": workers, "runs": found, **medians}


def floor() -> float:
    """Reading both adapters and writing as much, one thread, page cache warm: seconds."""
    target = FOLDER / "floor.bin"
    started = time.perf_counter()
    with open(target, "wb") as out:
        for model in MODELS:
            with open(FOLDER / model / "adapter_model.safetensors", "rb") as source:
                while chunk := source.read(1 << 24):
                    out.write(chunk)
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def side_by_side(rounds: int) -> dict[str, Any]:
    """CPU seconds of the floor and of the exact merge on one worker, in turn in this process; imports are warm."""
    import graftkit

    told, out, found = recipe("exact"), FOLDER / "out-exact", []
    graftkit.merge(told, out, overwrite=True, workers=1)
    for _ in range(rounds):
        started = time.process_time()
        floor()
        between = time.process_time()
        graftkit.merge(told, out, overwrite=True, workers=1)
        found.append({"floor": between - started, "exact": time.process_time() - between})
    return {"runs": found, "ratio": sorted(run["exact"] / run["floor"] for run in found)}


def differences() -> dict[str, float]:
    """One module of each shape against the dense sum in float64: the relative error of the exact merge, and by how much
    the error at rank 16 exceeds the best approximation's, from the dense sum's singular values."""
    import numpy as np
    from safetensors import safe_open

    def product(folder: str, module: str, scale: float = 1.0) -> Any:
        with safe_open(FOLDER / folder / "adapter_model.safetensors", "np") as file:
            a, b = (file.get_tensor(f"base_model.model.{module}.lora_{part}.weight").astype("f8") for part in "AB")
        return scale * b @ a

    found = {}
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        module = f"model.layers.7.{name}"
        wanted = sum(product(model, module, 2 * weight) for model, weight in zip(MODELS, WEIGHTS, strict=True))
        found[f"{name} exact"] = float(np.linalg.norm(product("out-exact", module) - wanted) / np.linalg.norm(wanted))
        gram = wanted @ wanted.T if wanted.shape[0] <= wanted.shape[1] else wanted.T @ wanted
        squares = np.linalg.eigvalsh(gram)[::-1]
        best = np.sqrt(squares[RANK:].clip(0).sum())
        found[f"{name} rank {RANK}"] = float(np.linalg.norm(product(f"out-{RANK}", module) - wanted) / best - 1)
    return found


def peft_svd(shape: tuple[int, int]) -> dict[str, float]:
    """Seconds, of wall and CPU, of PEFT's `add_weighted_adapter(combination_type="svd")` on one module."""
    import peft
    import torch

    model = torch.nn.Sequential()
    model.add_module("proj", torch.nn.Linear(shape[1], shape[0], bias=False))
    config = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=["proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, adapter_name="math")
    wrapped.add_adapter("code", config)
    wall, cpu = time.perf_counter(), time.process_time()
    wrapped.add_weighted_adapter(list(MODELS), list(WEIGHTS), "merged", combination_type="svd", svd_rank=RANK)
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "threads": torch.get_num_threads()}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--peft", action="store_true", help="measure PEFT too (minutes)")
    arguments.add_argument("--cpu", action="store_true", help="CPU seconds, floor and exact merge in turn")
    arguments.add_argument("--check", action="store_true", help="compare with the dense sums too (a minute)")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--workers", type=int, default=2)
    given = arguments.parse_args()
    make()
    made: dict[str, Any] = {"when": datetime.now(timezone.utc).isoformat(timespec="seconds"), "load": os.getloadavg()}
    if given.peft:
        found = {shape: peft_svd(shape) for shape in dict.fromkeys(SHAPES.values())}
        made["peft"] = {"x".join(map(str, shape)): told for shape, told in found.items()}
        made["peft_scaled"] = {k: LAYERS * sum(found[s][k] for s in SHAPES.values()) for k in ("wall", "cpu")}
    elif given.cpu:
        made["cpu"] = side_by_side(given.rounds)
    else:
        made["floor"] = sorted(floor() for _ in range(given.rounds))[given.rounds // 2]
        made["graftkit"] = [ours(rank, given.rounds, given.workers) for rank in (RANK, "exact")]
        made |= {"differences": differences()} if given.check else {}
    print(json.dumps(made, indent=1))
    kind = "-peft" * given.peft + "-cpu" * given.cpu
    name = f"{made['when'][:16].replace('T', '-').replace(':', '')}-adapters{kind}.json"
    (RESULTS / name).write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
