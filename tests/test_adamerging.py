"""AdaMerging: FusionBench's trajectories, the slopes without a graph through the merge, and a recipe that uses them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from graftkit.data.tasks import Item, Task
from graftkit.errors import GraftError, OutputError
from graftkit.execution.live import Live
from graftkit.improving.adamerging import Entropy, Settings, adamerging, descend, slopes
from graftkit.improving.gated import Gated, deltas_of
from graftkit.measuring.responses import Delta
from graftkit.recipes.plan import plan

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT on transformers 5

ORACLES = np.load(Path(__file__).parent / "oracles" / "fusion_bench_adamerging.npz")


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_five_steps_are_fusion_benchs(scope):
    case = f"adamerging_{'layer' if scope == 'tensor' else 'task'}_wise_5steps"

    def held(name):
        return torch.from_numpy(ORACLES[f"{case}/{name}"])

    base = [held(f"in/base{k}") for k in range(4)]
    deltas = [[Delta(right=held(f"in/m{t}_{k}") - base[k]) for t in range(2)] for k in range(4)]

    def slope(coefficients):
        weights = [
            (w + sum(c * d.right for c, d in zip(coefficients[:, k], own, strict=True))).requires_grad_(True)
            for k, (w, own) in enumerate(zip(base, deltas, strict=True))
        ]
        total = torch.zeros((), dtype=torch.float64)
        for name in ("in/x0", "in/x1"):
            hidden = torch.tanh(held(name) @ weights[0].T + weights[1])
            sure = (hidden @ weights[2].T + weights[3]).log_softmax(-1)
            total = total - (sure.exp() * sure).sum(-1).mean()
        total.backward()
        return float(total.detach()), slopes([w.grad for w in weights], deltas)

    trail = held("lambda_trajectory").numpy()
    for steps in (1, 5):
        found, losses = descend(slope, 2, 4, Settings(scope, steps, rate=0.05), lambda *told: None)
        want = trail[steps] if scope == "tensor" else np.repeat(trail[steps][:, None], 4, axis=1)
        np.testing.assert_allclose(found.numpy(), want, atol=2e-6)
        np.testing.assert_allclose(losses, held("losses").numpy()[:steps], atol=2e-6)


def family(place):
    """A base, a tuned model and an adapter, with a tokenizer, and examples of two domains."""
    from peft import LoraConfig, get_peft_model

    import talker

    base, tuned = talker.tiny(0), talker.tiny(0)
    torch.manual_seed(3)
    for weight in tuned.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.05)
    for model, name in ((base, "base"), (tuned, "tuned")):
        model.save_pretrained(place / name)
        talker.tokenizer().save_pretrained(place / name)
    adapted = get_peft_model(talker.tiny(0), LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(place / "adapter")
    models = [{"model": "tuned", "weight": 0.5}, {"model": "adapter"}]
    made = {"method": "task_arithmetic", "base": "base", "models": models, "knobs": {"scale": 0.7}}
    (place / "recipe.yaml").write_text(yaml.safe_dump(made | {"accept_base": True}))
    for name in ("one", "two"):
        lines = [{"prompt": f"Say {name} {k}", "answer": "yes " * (k + 1)} for k in range(3)]
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return place


def test_slopes_are_those_through_the_merged_weights(tmp_path):
    planned = plan(family(tmp_path) / "recipe.yaml")
    steps = tuple(step for step in planned.steps if step.method)
    row = [None]

    def turn():
        while True:
            yield row

    with Live.open(planned) as live:
        from graftkit.measuring.encoding import encode

        task = Task("t", "answer_loss", tuple(Item(f"Say {k}", ("yes " * (k + 1),)) for k in range(2)))
        row[:] = encode(live.tokenizer, task)
        deltas = {step.key: deltas_of(Gated(planned, steps), step, "cpu") for step in steps}
        entropy = Entropy(live, steps, deltas, [turn(), turn()])
        at = torch.rand(2, len(steps), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        total, found = entropy(at)
        assert total > 0 and found[1].count_nonzero() == 4  # two matrices a layer
        for t, k in ((0, 0), (0, 5), (1, int(found[1].nonzero()[0])), (1, int(found[1].nonzero()[-1]))):
            near = []
            for step in (0.02, -0.02):
                moved = at.clone()
                moved[t, k] += step
                near.append(entropy(moved)[0])
            assert (near[0] - near[1]) / 0.04 == pytest.approx(float(found[t, k]), rel=0.02, abs=2e-4)
        assert entropy(at)[0] == total  # nothing is left of what was tried


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_the_command_writes_a_recipe_that_merges(tmp_path, scope):
    from typer.testing import CliRunner

    from graftkit.cli import app

    place, out = family(tmp_path), tmp_path / "out"
    data = [word for name in ("one", "two") for word in ("--data", str(place / f"{name}.jsonl"))]
    asked = ["adamerging", str(place / "recipe.yaml"), str(out), *data, "--steps", "6", "--rate", "0.05"]
    shown = CliRunner().invoke(app, [*asked, "--scope", scope, "--json"])
    assert shown.exit_code == 0, shown.output
    told = json.loads((out / "adamerging.json").read_text())
    assert len(told["entropies"]) == 6 and told["entropies"][-1] < told["entropies"][0]
    found = yaml.safe_load((out / "coefficients.yaml").read_text())["tensors"]
    assert (
        len({tuple(own) for own in found.values()}) > 1
        if scope == "tensor"
        else len(set(map(tuple, found.values()))) == 1
    )
    assert all(0 <= value <= 1 for own in found.values() for value in own)
    with Live.open(out / "recipe.yaml") as live:
        live.apply()
        step = next(step for step in live.plan.steps if step.name.endswith("0.self_attn.q_proj.weight"))
        assert step.knobs["weight"] == tuple(found[step.name])
    with pytest.raises(OutputError, match="exists already"):
        adamerging(place / "recipe.yaml", out, data=[place / "one.jsonl", place / "two.jsonl"])


def test_adapters_leave_most_tensors_alone_and_the_recipe_merges(tmp_path):
    from graftkit import merge

    place, out = family(tmp_path), tmp_path / "out"
    told = yaml.safe_load((place / "recipe.yaml").read_text()) | {
        "models": [{"model": "adapter"}, {"model": "adapter"}]
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(told))
    data = [place / "one.jsonl", place / "two.jsonl"]
    made = adamerging(place / "recipe.yaml", out, data=data, settings=Settings(steps=2))
    assert len(made.coefficients) == 4
    assert {"embed_tokens", "q_proj"} <= {
        told["name"].split(".")[-2] for told in merge(out / "recipe.yaml", tmp_path / "m")["tensors"]
    }


@pytest.mark.parametrize("knobs", [{"weight": 0.1}, {"weight": 0.1, "scale": 0.5}])
def test_weights_of_rules_give_way_to_what_was_found(tmp_path, knobs):
    place, out = family(tmp_path), tmp_path / "out"
    told = yaml.safe_load((place / "recipe.yaml").read_text())
    told["rules"] = [{"where": {"role": "attention"}, "knobs": knobs}]
    (place / "recipe.yaml").write_text(yaml.safe_dump(told))
    data = [place / "one.jsonl", place / "two.jsonl"]
    made = adamerging(place / "recipe.yaml", out, data=data, settings=Settings(steps=2))
    steps = {step.name: step.knobs for step in plan(out / "recipe.yaml").steps if step.method}
    assert {name: list(own["weight"]) for name, own in steps.items()} == made.coefficients
    scales = {own["scale"] for name, own in steps.items() if "attn" in name}
    assert scales == {knobs.get("scale", told.get("knobs", {}).get("scale", 1.0))}


def test_other_merges_are_refused(tmp_path):
    place = family(tmp_path)
    data = [place / "one.jsonl", place / "two.jsonl"]
    made = yaml.safe_load((place / "recipe.yaml").read_text())
    for change in ({"method": "ties"}, {"prepare": [{"trim": {"density": 0.5}}]}, {"knobs": {"normalize": True}}):
        (place / "other.yaml").write_text(yaml.safe_dump(made | change))
        with pytest.raises(GraftError, match="AdaMerging finds the weights"):
            adamerging(place / "other.yaml", tmp_path / "out", data=data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": math.nan}, "--start: expected a number from 0 to 1"),
        ({"start": 5.0}, "--start: expected a number from 0 to 1, or any with --no-clip, got 5.0"),
        ({"start": math.inf, "clip": False}, "--start: expected a number, got inf"),
        ({"rate": 1e30, "clip": False, "steps": 2}, "--rate: the coefficients are no numbers any more after 2 steps"),
    ],
)
def test_coefficients_stay_numbers(tmp_path, changes, message):
    place = family(tmp_path)
    data = [place / "one.jsonl", place / "two.jsonl"]
    with pytest.raises(GraftError, match=message):
        adamerging(place / "recipe.yaml", tmp_path / "out", data=data, settings=Settings(**changes))
    assert not (tmp_path / "out").exists()
