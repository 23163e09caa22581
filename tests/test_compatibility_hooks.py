"""`graft compatibility --json` against equations 9 to 14 by plain hooks in float64: texts and images, a full model and
an adapter that PEFT itself loads, one sample at a time and four at a time with padding masked by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import talker
import test_images as pictures
from graftkit.cli import app
from graftkit.measuring.compatibility import compatibility
from test_compatibility import adapter, save

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft's
    pytest.mark.filterwarnings("ignore:.*torchvision.*"),
]
EPSILON = 0.1
LENGTHS = (3, 11, 7, 2, 14, 5, 9, 4, 12, 6)


def prepare(folder: Path, images: bool) -> tuple[Path, Path, list[tuple[str, list[str], str]]]:
    """A base, an adapter on it, and samples (a prompt, its images, an answer) written as JSONL."""
    model = pictures.vlm() if images else talker.tiny()
    base = save(folder / "base", model)
    if images:
        pictures.processor().save_pretrained(base)
    samples = []
    for number, length in enumerate(LENGTHS):
        shown = [f"{number % 6}.png"] * (images and number % 3)  # none, one and two
        prompt = "<image>" * len(shown) + "what is the cat of France? "[: 2 * length]
        samples.append((prompt, shown, "a cat, five and four"[: 1 + length]))
    if images:
        source = torch.Generator().manual_seed(0)
        from PIL import Image

        for number in range(6):
            points = torch.randint(0, 256, (8, 8, 3), generator=source, dtype=torch.uint8).numpy()
            Image.fromarray(points).save(folder / f"{number}.png")
    records = [{"prompt": p, "answer": a, **({"images": i} if i else {})} for p, i, a in samples]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return base, adapter(folder / "tuned", model, targets="q_proj down_proj v_proj"), samples


def batches(base: Path, folder: Path, samples: Any, images: bool, size: int) -> Iterator[tuple[dict[str, Any], Any]]:
    """The inputs of a forward pass, padded on the right, and each row's real length; batches of equally many images."""
    from PIL import Image

    words = talker.tokenizer() if not images else pictures.processor().tokenizer
    rows = []
    for number, (prompt, shown, answer) in enumerate(samples):
        given: dict[str, Any] = {}
        if images:
            opened = [Image.open(folder / name).convert("RGB") for name in shown]
            text = prompt.replace("<image>", pictures.IMAGE)
            made = pictures.processor()(text=text, images=opened or None, return_tensors="pt", add_special_tokens=False)
            ids = made["input_ids"][0].tolist()
            given = {"pixel_values": made["pixel_values"]} if opened else {}
        else:
            ids = list(words(prompt, add_special_tokens=False)["input_ids"])
        rows.append((number, len(shown), ids + list(words(answer, add_special_tokens=False)["input_ids"]), given))
    for count in sorted({row[1] for row in rows}):
        alike = [row for row in rows if row[1] == count]
        for start in range(0, len(alike), size):
            part = alike[start : start + size]
            width = max(len(row[2]) for row in part)
            ids = torch.tensor([row[2] + [0] * (width - len(row[2])) for row in part])
            mask = torch.tensor([[1] * len(row[2]) + [0] * (width - len(row[2])) for row in part])
            given = {"pixel_values": torch.cat([row[3]["pixel_values"] for row in part]).double()} if count else {}
            yield {"input_ids": ids, "attention_mask": mask, **given}, [(row[0], len(row[2])) for row in part]


def measured(
    model: Any, wanted: dict[str, Any], passes: Any, inputs: bool = False
) -> dict[str, dict[int, torch.Tensor]]:
    """What each wanted module answers to (or gets with) each sample, [tokens, features], without padding."""
    heard: dict[str, dict[int, torch.Tensor]] = {name: {} for name in wanted}
    present: list[tuple[int, int]] = []

    def hook(name: str) -> Any:
        def keep(module: Any, given: Any, answer: Any) -> None:
            for row, (number, length) in enumerate(present):
                heard[name][number] = (given[0] if inputs else answer)[row, :length].detach().clone()

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in wanted.items()]
    with torch.no_grad():
        for given, rows in passes:
            present[:] = rows
            model(**given)
    for handle in handles:
        handle.remove()
    return heard


def equations(heard: dict[str, dict[int, torch.Tensor]]) -> dict[str, Any]:
    """Equations 9 to 14 from all activations, held."""
    parts = []
    for own in heard.values():
        each = [own[number] for number in range(len(LENGTHS))]
        eps = EPSILON * torch.stack([a.abs().mean() for a in each[:4]]).mean()
        mu = torch.stack([a.abs().sum() / a.numel() for a in each]).mean()
        s = torch.stack([(a.abs() < eps).sum() / torch.tensor(a.numel()).double() for a in each]).mean()
        v = torch.stack([((a - a.mean()) ** 2).sum() / a.numel() for a in each]).mean()
        parts.append(torch.stack([mu, s, v]))
    raw = torch.stack(parts)
    spread = (raw - raw.amin(0)) / (raw.amax(0) - raw.amin(0))
    rho, primed = (x[:, 0] * (1 - x[:, 1]) * x[:, 2].sqrt() for x in (raw, spread))
    return {"parts": raw, "raw": float(rho.mean()), "normalised": float(primed.mean()), "primed": primed}


def wanted_of(model: Any) -> dict[str, Any]:
    """The projections of the language model's layers, by the names of a model without PEFT's wrapping."""
    found = {}
    for name, module in model.named_modules():
        clean = name.removeprefix("base_model.model.")
        if "vision" not in name and "layers." in name and name.endswith("_proj"):
            found[clean] = module
    return found


@pytest.mark.parametrize("images", [False, True], ids=["text", "images"])
@pytest.mark.parametrize("size", [1, 4])
def test_the_program_agrees_with_plain_hooks(tmp_path: Path, images: bool, size: int) -> None:
    from peft import PeftModel

    base, tuned, samples = prepare(tmp_path, images)
    plain = (pictures.vlm() if images else talker.tiny()).double()
    told = CliRunner().invoke(app, ["compatibility", str(base), str(tuned), "--data", str(tmp_path / "data.jsonl"),
                                    "--base", str(base), "--resamples", "0", "--json"])  # fmt: skip
    assert told.exit_code == 0, told.output
    fits = {fit["model"]: fit for fit in json.loads(told.stdout)["fits"]}
    try:
        grown = PeftModel.from_pretrained(plain, tuned).double().eval()
        for fit in (fits["tuned"], fits["base"]):
            with grown.disable_adapter() if fit is fits["base"] else nullcontext():
                heard = measured(grown, wanted_of(grown), batches(base, tmp_path, samples, images, size))
            found = equations(heard)
            assert [module["name"] for module in fit["modules"]] == list(heard)
            for key, column in (("magnitude", 0), ("sparsity", 1), ("variance", 2)):
                given = torch.tensor([module[key] for module in fit["modules"]], dtype=torch.float64)
                torch.testing.assert_close(given, found["parts"][:, column], rtol=2e-5, atol=1e-6)
            assert fit["raw"]["value"] == pytest.approx(found["raw"], rel=2e-5)
            assert fit["normalised"]["value"] == pytest.approx(found["normalised"], rel=2e-5)
        assert fits["tuned"]["raw"]["value"] != pytest.approx(fits["base"]["raw"]["value"], rel=1e-3)
    finally:
        pictures.vlm.cache_clear()


@pytest.mark.parametrize("size", [1, 4])
def test_a_contribution_agrees_with_plain_products(tmp_path: Path, size: int) -> None:
    """`scale B A x` with the inputs that modules get in the adapted VLM, images among them."""
    from peft import PeftModel

    base, tuned, samples = prepare(tmp_path, images=True)
    fit = compatibility([tuned], tmp_path / "data.jsonl", base=base, of="contribution", resamples=0).fits[0]
    try:
        grown = PeftModel.from_pretrained(pictures.vlm().double(), tuned).double().eval()
        factors = load_file(tuned / "adapter_model.safetensors")
        changed = {
            n: m for n, m in wanted_of(grown).items() if n.rpartition(".")[2] in ("q_proj", "down_proj", "v_proj")
        }
        heard = measured(grown, changed, batches(base, tmp_path, samples, True, size), inputs=True)
        added = {}
        for name, own in heard.items():
            a, b = (factors[f"base_model.model.{name}.lora_{k}.weight"].double() for k in "AB")
            added[name] = {number: 2 * (x @ a.T) @ b.T for number, x in own.items()}
        found = equations(added)
        assert {module.name for module in fit.modules} == set(added)
        assert fit.raw.value == pytest.approx(found["raw"], rel=2e-5)
        assert fit.normalised.value == pytest.approx(found["normalised"], rel=2e-5)
    finally:
        pictures.vlm.cache_clear()
