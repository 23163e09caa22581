"""Gates solved from examples: moments as the activations have them, closed forms as searches find them, the command."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import graftkit
import talker
import tiny
from graftkit.checkpoints.gates import open_gates
from graftkit.cli import app
from graftkit.errors import DataError, PlanError
from graftkit.improving.closed_forms import convex, free
from graftkit.improving.gates import Solved, solve
from graftkit.measuring.encoding import Row
from graftkit.measuring.responses import Delta, measure

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT on transformers 5

OUT = 6


def moments(models: int, seed: int = 0) -> np.ndarray:
    """Of random answers, [domains, models, models, out]."""
    answers = np.random.default_rng(seed).standard_normal((models, 20, models, OUT))
    return np.einsum("skti,skui->stui", answers, answers) / 20


def error(own: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`sum_s E_s (sum_t w_t D_t x - D_s x)^2` of each channel, from the moments."""
    total = np.zeros(own.shape[-1])
    for s, held in enumerate(own):
        apart = weights.copy()
        apart[s] -= 1
        total += np.einsum("ti,tui,ui->i", apart, held, apart)
    return total


def test_two_convex_weights_are_the_papers_ratio() -> None:
    own = moments(2)
    apart = [own[s, 0, 0] - 2 * own[s, 0, 1] + own[s, 1, 1] for s in (0, 1)]
    np.testing.assert_allclose(convex(own), np.stack(apart) / sum(apart), rtol=1e-7)


@pytest.mark.parametrize("models", [2, 3, 4])
def test_convex_weights_beat_all_others(models: int) -> None:
    own = moments(models, seed=models)
    own[:, 1:, :, :2] *= 0.1  # some channels where a model gets nothing
    own[:, :, 1:, :2] *= 0.1
    found = convex(own)
    assert (found >= 0).all() and np.allclose(found.sum(axis=0), 1)
    drawn = np.random.default_rng(0).dirichlet([0.5] * models, 3000)
    tried = np.concatenate([drawn, np.eye(models)])
    for one in tried:
        assert (error(own, found) <= error(own, np.repeat(one[:, None], OUT, 1)) + 1e-7).all()


def test_free_coefficients_have_no_slope_and_a_ridge_draws_them_to_the_prior() -> None:
    own = moments(3)
    found, step = free(own, 0.0, 1.0), 1e-4
    for t in range(3):
        for sign in (-step, step):
            moved = found.copy()
            moved[t] += sign
            assert (error(own, moved) >= error(own, found)).all()
    np.testing.assert_allclose(free(own, 1e9, 0.3), 0.3, atol=1e-6)


def test_channels_that_answer_nothing_get_equal_weights_and_the_prior() -> None:
    own = np.zeros((2, 2, 2, OUT))
    np.testing.assert_allclose(convex(own), 0.5)
    np.testing.assert_allclose(free(own, 0.1, 0.7), 0.7)


# Live models


def live(directory: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture
def family(tmp_path: Path) -> tuple[Path, Path, Path]:
    return tiny.family(tmp_path, dtype=torch.float32)


def test_moments_are_those_of_the_inputs_of_each_layer(family: tuple[Path, ...]) -> None:
    """Rows of different lengths in one batch: padding does not count."""
    model = live(family[0])
    rows = [Row((1, 2, 3), ((4,),), (0,)), Row((5,), ((6, 7, 8, 9, 10),), (1,)), Row((11, 12), ((13,),), (2,))]
    name = "model.layers.1.mlp.down_proj.weight"
    layer = model.get_submodule(name.removesuffix(".weight"))
    left, right, whole = torch.randn(16, 2), torch.randn(2, 24), torch.randn(16, 24)
    found = measure(model, rows, {name: [Delta(left, right), Delta(right=whole), Delta()]}, batch_tokens=14)[name]
    heard: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0][0]))
    with torch.inference_mode():
        for row in rows:
            model(input_ids=torch.tensor([row.layout()[0]]))
    handle.remove()
    inputs = torch.cat(heard).double()
    answers = torch.stack([inputs @ (left @ right).double().T, inputs @ whole.double().T, torch.zeros(len(inputs), 16)])
    wanted = torch.einsum("tki,uki->tui", answers, answers) / len(inputs)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-6)


def test_what_is_no_linear_layer_is_refused(family: tuple[Path, ...]) -> None:
    with pytest.raises(PlanError, match="is not the weight of a linear layer"):
        measure(live(family[0]), [], {"model.embed_tokens.weight": []}, batch_tokens=8)


# From files to a merge


def saved(model: object, place: Path) -> Path:
    model.save_pretrained(place)  # type: ignore[attr-defined]
    talker.tokenizer().save_pretrained(place)
    return place


def data(root: Path, name: str, *texts: str) -> Path:
    (root / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": t, "answer": f" {t}!"}) + "\n" for t in texts))
    return root / f"{name}.jsonl"


@pytest.fixture
def experts(tmp_path: Path) -> dict[str, object]:
    """A base, two adapters on it, the same two as full models, and examples of two domains."""
    base = saved(talker.tiny(), tmp_path / "base")
    adapters, whole = [], []
    for k, name in enumerate(("one", "two")):
        live_base = talker.tiny()
        torch.manual_seed(k)  # of the adapter
        config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(live_base, config)
        model.save_pretrained(tmp_path / name)
        adapters.append(str(tmp_path / name))
        whole.append(str(saved(model.merge_and_unload(), tmp_path / f"{name}-whole")))
    tasks = [data(tmp_path, "a", "the cat sat", "two and two"), data(tmp_path, "b", "Berlin is a city", "what is")]
    return {"base": str(base), "adapters": adapters, "whole": whole, "tasks": tasks}


def solved(experts: dict, out: Path, method: str, models: str, **options: object) -> tuple[Solved, dict]:
    recipe = {"method": method, "models": experts[models], "base": experts["base"], "accept_base": models == "adapters"}
    found = solve(graftkit.Recipe.model_validate(recipe), out, data=experts["tasks"], device="cpu", **options)
    gates = open_gates(out / "gates.safetensors")
    return found, {n: gates.rows(n, 1, 0, info.shape[1])[..., 0] for n, info in gates.tensors.items()}


@pytest.mark.parametrize("method", ["graft", "graft_convex", "graft_free"])
def test_adapters_and_the_same_full_models_get_the_same_gates(experts: dict, tmp_path: Path, method: str) -> None:
    found, narrow = solved(experts, tmp_path / "narrow", method, "adapters")
    _, wide = solved(experts, tmp_path / "wide", method, "whole")
    touched = [name for name in narrow if "q_proj" in name or "down_proj" in name]
    assert found.matrices == len(narrow) == len(touched) == 4 and set(touched) < set(wide)
    assert found.kind == ("coefficient" if method == "graft_free" else "weight")
    for name in touched:
        np.testing.assert_allclose(narrow[name], wide[name], atol=2e-3)
    record = graftkit.merge(found.recipe, tmp_path / "out")
    assert record["gates"]["matrices"] == 4


def test_each_model_is_nearest_to_itself_on_its_own_examples(experts: dict, tmp_path: Path) -> None:
    """The weights are those that the moments of the two live models give."""
    from graftkit.data.tasks import load_task
    from graftkit.measuring.encoding import encode

    _, gates = solved(experts, tmp_path / "out", "graft_convex", "whole")
    models = [LlamaForCausalLM.from_pretrained(place, dtype=torch.float32).eval() for place in experts["whole"]]
    name = "model.layers.0.self_attn.q_proj.weight"
    apart = models[0].state_dict()[name] - models[1].state_dict()[name]
    squares = []
    for model, place in zip(models, experts["tasks"], strict=True):
        rows = encode(talker.tokenizer(), load_task(place), 256)
        found = measure(model, rows, {name: [Delta(right=apart)]}, batch_tokens=4096)
        squares.append(found[name][0, 0])
    np.testing.assert_allclose(gates[name], np.stack(squares) / sum(squares), rtol=1e-4)


def test_the_command_writes_a_recipe_that_merges(experts: dict, tmp_path: Path) -> None:
    beside = [{"model": m, "data": str(t)} for m, t in zip(experts["whole"], experts["tasks"], strict=True)]
    recipe = tiny.recipe(tmp_path, json.dumps({"method": "graft_convex", "models": beside}))
    done = CliRunner().invoke(app, ["gates", "solve", str(recipe), str(tmp_path / "out"), "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["kind"] == "weight" and told["examples"] == 4 and told["matrices"] == 14
    graftkit.merge(told["recipe"], tmp_path / "merged")


def test_the_recipe_names_what_its_output_is_like_from_anywhere(experts: dict, tmp_path: Path) -> None:
    """Models by relative paths, one of which the output is like, as it is a VLM in its recipes."""
    names = [os.path.relpath(place, tmp_path) for place in experts["whole"]]
    told = {"method": "graft_convex", "models": names, "output": {"like": names[1]}}
    made = solve(
        tiny.recipe(tmp_path, json.dumps(told)), tmp_path / "deep" / "out", data=experts["tasks"], device="cpu"
    )
    graftkit.merge(made.recipe, tmp_path / "merged")


def test_what_cannot_be_solved_is_refused(experts: dict, tmp_path: Path) -> None:
    def told(**changes: object) -> graftkit.Recipe:
        return graftkit.Recipe.model_validate({"method": "graft", "models": experts["whole"], **changes})

    with pytest.raises(DataError, match="2 models need examples of 2 domains, got 1"):
        solve(told(), tmp_path / "out", data=experts["tasks"][:1])
    with pytest.raises(PlanError, match="average reads no gates"):
        solve(told(method="average"), tmp_path / "out", data=experts["tasks"])
    with pytest.raises(PlanError, match="solve them one by one"):
        rules = [{"where": {"role": "mlp"}, "method": "graft_free"}]
        solve(told(rules=rules, base=experts["base"]), tmp_path / "out", data=experts["tasks"])
