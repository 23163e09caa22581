"""Spectral methods beside what their authors' code computes: closed-form WUDI and Adam, TSV-M and full SVDs.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/spectral.py wudi      # SmolLM2's matrices, two models
    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/spectral.py tsv       # eight models, 4096 x 4096

One thread, CPU seconds. Adam is timed for a few steps in float32, as published, and scaled to 300; its deltas are
random. TSV-M's baseline is one full SVD in float32, times the ten that it makes: one for each model, and two to
orthogonalise. Its deltas have full rank and singular values `(1 + 58 i / n)^-1.1`: that is how those of the orchard's
fully tuned maths expert fall, whose first eighth holds 0.85 to 0.96 of the energy (here 0.93). `--white` takes random
numbers instead, whose singular values are all of about one size.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import torch

from graftkit.methods import get
from graftkit.methods.decomposition import sketched
from harness import RESULTS

LAYERS, STEPS, FEW = 30, 300, 3
SHAPES = {(576, 576): 2, (192, 576): 2, (1536, 576): 2, (576, 1536): 1}
"""SmolLM2-135M's matrices, and how many of each a layer has."""


def seconds(run: Callable[[], Any]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def deltas(models: int, rows: int, columns: int) -> torch.Tensor:
    return 1e-3 * torch.randn((models, rows, columns), generator=torch.Generator().manual_seed(0))


def falling(size: int, seed: int) -> torch.Tensor:
    """A matrix of known singular values and random directions: a fast Walsh-Hadamard transform of both sides."""
    draw = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(size, generator=draw) for _ in range(2))
    made = torch.zeros(size, size)
    made[rows, columns] = 1e-3 * (1 + 57.6 * torch.arange(size) / size) ** -1.1
    for _ in range(2):
        half = 1
        while half < size:
            pairs = made.view(size // (2 * half), 2, half, size)
            made, half = torch.cat([pairs.sum(1, True), -pairs.diff(dim=1)], dim=1).view(size, size), 2 * half
        made = made.T / size**0.5
    signs = [2.0 * torch.randint(2, (size,), generator=draw) - 1 for _ in range(2)]
    return signs[0][:, None] * made * signs[1]


def adam(stack: torch.Tensor, steps: int) -> torch.Tensor:
    """The published loop: autograd through `|(M - delta_t) delta_t^T|^2 / |delta_t|^2`."""
    merged = torch.nn.Parameter(stack.sum(dim=0))
    optimizer, squares = torch.optim.Adam([merged], lr=1e-5), stack.square().sum(dim=(1, 2))
    for _ in range(steps):
        apart = torch.matmul(merged - stack, stack.transpose(1, 2))
        (apart.square() / squares[:, None, None]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return merged.detach()


def wudi(rounds: int) -> dict[str, Any]:
    """Seconds of each shape, closed form and Adam in turn, and of the whole model."""
    found: dict[str, Any] = {}
    for shape, count in SHAPES.items():
        stack = deltas(2, *shape)
        with torch.inference_mode():
            get("wudi").function(stack)
        closed, iterated = [], []
        for _ in range(rounds):
            with torch.inference_mode():
                closed.append(seconds(lambda stack=stack: get("wudi").function(stack)))
            iterated.append(seconds(lambda stack=stack: adam(stack, FEW)) * STEPS / FEW)
        found["x".join(map(str, shape))] = {"a_layer": count, "closed": sorted(closed), "adam": sorted(iterated)}
    for kind in ("closed", "adam"):
        found[f"model_{kind}"] = LAYERS * sum(f["a_layer"] * f[kind][rounds // 2] for f in list(found.values())[:4])
    return found | {"ratio": found["model_adam"] / found["model_closed"]}


def tsv(size: int, models: int, white: bool, kinds: list[str]) -> dict[str, Any]:
    """Seconds of the merge and of a full SVD; the energy of the first directions that a sketch captures."""
    stack = deltas(models, size, size) if white else torch.stack([falling(size, seed) for seed in range(models)])
    found: dict[str, Any] = {"size": size, "models": models, "white": white}
    with torch.inference_mode():
        held: list[torch.Tensor] = []
        found["svd"] = seconds(lambda: held.append(torch.linalg.svd(stack[0], full_matrices=False)[1]))
        for kind in kinds:
            found[kind] = seconds(lambda kind=kind: get("tsv").function(stack, (size, size), svd=kind))
        rank = size // models
        found["captured"] = float(sketched(stack[0], rank).sizes.square().sum() / held[0][:rank].square().sum())
    full = found["svd"] * (models + 2)
    return found | {"full_svds": full, **{f"ratio_{kind}": full / found[kind] for kind in kinds}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["wudi", "tsv"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--white", action="store_true", help="tsv: deltas of random numbers")
    parser.add_argument("--kinds", nargs="+", default=["exact", "sketched"], help="tsv: which ways are timed")
    parser.add_argument("--models", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()
    made = (
        wudi(options.rounds)
        if options.what == "wudi"
        else tsv(options.size, options.models, options.white, options.kinds)
    )
    now = datetime.now(timezone.utc)
    told = {"when": now.isoformat(timespec="seconds"), "load": load, "torch": torch.__version__, options.what: made}
    text = json.dumps(told, indent=1)
    (RESULTS / f"{now:%Y-%m-%d-%H%M}-spectral-{options.what}.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
