"""Gates that are learnt: gradients against plain autograd, the live fused model against the merge, loop and command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import graftkit
import graftkit.recipes.recipe
import talker
from graftkit.checkpoints.gates import open_gates
from graftkit.cli import app
from graftkit.data.tasks import load_task
from graftkit.errors import DataError, OutputError, PlanError
from graftkit.improving.gated import gated
from graftkit.improving.learnable import Form, learnable
from graftkit.improving.learning import PRESETS, Example, Settings, Training, cut, mean_loss, rate_at, step_loss, stream
from graftkit.improving.phi import KINDS, Gating, Matrix, Phi, distances, heads_of, standardised
from graftkit.improving.training import running, train
from graftkit.measuring.encoding import Row, encode
from graftkit.measuring.fused import FusedLinear, block_sums, spread
from graftkit.measuring.responses import Delta
from graftkit.measuring.scoring import Scorer, choose_scorer
from graftkit.methods.graft import graft_weights
from graftkit.methods.signals import distance_of
from graftkit.recipes.plan import plan

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT on transformers 5

QUICK = Settings(rate=0.05, steps=4, batch=2, every=2, length=256)


# The layer


def factors(models: int, out: int, wide: int, whole: bool) -> list[Delta]:
    """Random deltas in float64, the last of another rank, and one that is nothing."""
    made = []
    for t in range(models):
        left, right = torch.randn(out, 2 + t).double(), torch.randn(2 + t, wide).double()
        made.append(Delta(right=left @ right) if whole else Delta(left, right))
    return [made[0], Delta(), *made[1:]]


@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize("whole", [False, True], ids=["factors", "whole"])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_through_the_fused_weight(size: int, whole: bool, bias: bool) -> None:
    """Ragged blocks: 7 x 5 by 3. In float64, relative in norm."""
    torch.manual_seed(0)
    plain = nn.Linear(5, 7, bias=bias).double().requires_grad_(False)
    deltas = factors(3, 7, 5, whole)
    grid = (7,) if not size else (-(-7 // size), -(-5 // size))
    given = torch.rand(4, *grid, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    wanted = torch.randn(2, 6, 7, dtype=torch.float64)

    layer = FusedLinear(plain, deltas, lambda: given, size)
    answers = layer(inputs)
    found = torch.autograd.grad((answers * wanted).sum(), (given, inputs))

    weight = plain.weight
    for t, delta in enumerate(deltas):
        if delta.right is not None:
            dense = delta.right if delta.left is None else delta.left @ delta.right
            weight = weight + (spread(given[t], size, (7, 5)) if size else given[t][:, None]) * dense
    straight = nn.functional.linear(inputs, weight, plain.bias)
    exact = torch.autograd.grad((straight * wanted).sum(), (given, inputs))
    assert torch.allclose(answers, straight, rtol=1e-12, atol=1e-12)
    for got, good in zip(found, exact, strict=True):
        assert (got - good).norm() <= 1e-9 * good.norm()


def test_blocks_sum_and_spread_are_each_others_adjoint() -> None:
    matrix, blocks = torch.randn(7, 5).double(), torch.randn(3, 2).double()
    assert torch.isclose((block_sums(matrix, 3) * blocks).sum(), (matrix * spread(blocks, 3, (7, 5))).sum())


# phi


def test_distances_are_the_papers_and_those_of_the_merge() -> None:
    torch.manual_seed(1)
    deltas = factors(2, 6, 4, False)
    stack = torch.stack([torch.zeros(6, 4).double() if d.right is None else d.left @ d.right for d in deltas])
    assert torch.allclose(distances(deltas, (6, 4)), distance_of(stack))
    pair = [deltas[0], deltas[2]]
    apart = (stack[0] - stack[2]).abs()
    assert torch.allclose(distances(pair, (6, 4)), apart.sum(dim=1).expand(2, -1))
    assert torch.allclose(distances(pair, (6, 4), 4)[0], torch.stack([apart[:4].sum(), apart[4:].sum()])[:, None])


def gating(kind: str, phi: str, models: int = 2, grid: tuple[int, ...] = (6,)) -> Gating:
    features = {n: standardised(torch.rand(heads_of(kind, models), *grid).double()) for n in ("a", "b")}
    knobs = {"a": 0.4, "c": 500.0, "normaliser": "pi", "sharpness": 1.0, "scale": 0.5}
    signals, start = torch.linspace(1.0, 1.01, models).double(), torch.rand(models, *grid).double()
    start = start if kind == "coefficient" else start / start.sum(dim=0)
    method = {"local": "graft", "weight": "graft_convex", "coefficient": "graft_free"}[kind]
    return Gating(Phi(phi, features), {n: Matrix(method, knobs, signals, start) for n in features}, kind)


@pytest.mark.parametrize("kind", ["local", "weight", "coefficient"])
@pytest.mark.parametrize("phi", KINDS)
@pytest.mark.parametrize("models", [2, 3])
def test_gates_begin_at_their_start_and_every_phi_can_move_them(kind: str, phi: str, models: int) -> None:
    made = gating(kind, phi, models)
    start = made.matrices["a"].start
    assert torch.allclose(made.gates("a"), start, atol=1e-12)
    if kind == "local":
        matrix = made.matrices["a"]
        knobs = {key: matrix.knobs[key] for key in ("a", "c", "normaliser", "sharpness")}
        assert torch.equal(made("a"), graft_weights(matrix.signals, made.gates("a"), **knobs))
    else:
        assert torch.allclose(made("a"), start * (0.5 if kind == "coefficient" else 1), atol=1e-12)
    made("a").square().sum().backward()
    assert any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in made.parameters())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert not torch.allclose(made.gates("a"), start)
    if kind != "coefficient":
        assert torch.allclose(made.gates("a").sum(dim=0), torch.ones(6).double())


def test_two_models_share_the_papers_one_gate() -> None:
    made = gating("local", "affine")
    with torch.no_grad():
        made.phi.scales[0].fill_(0.7)
        made.phi.shifts[0].fill_(-0.2)
    start = made.matrices["a"].start
    odds = (start[0] / start[1]).log()
    wanted = torch.sigmoid(odds + 0.7 * made.phi.features["a"][0] - 0.2)
    assert torch.allclose(made.gates("a"), torch.stack([wanted, 1 - wanted]))


@pytest.mark.parametrize("phi", ["affine", "channelwise", "mlp", "direct"])
def test_blocks_have_gates_of_their_own(phi: str) -> None:
    assert gating("local", phi, grid=(3, 2))("a").shape == (2, 3, 2)


# The loop


def test_every_batch_takes_from_all_domains_in_turn() -> None:
    rows = [[Row((k,), ((k,),), (0,)) for _ in range(3)] for k in range(3)]
    source = stream(rows, 2, 0)
    assert [[one.domain for one in next(source)] for _ in range(3)] == [[0, 1], [2, 0], [1, 2]]


def test_rows_are_cut_at_the_end_of_their_answer() -> None:
    row = Row((1, 2, 3), ((4, 5, 6),), (0,))
    assert cut(row, 6) is row and cut(row, 4) == Row((1, 2, 3), ((4,),), (0,)) and cut(row, 3) is None


def test_the_loss_weighs_domains_alike_in_whatever_parts_it_is_taken() -> None:
    model = talker.tiny().requires_grad_(False)
    rows = [Row((1, 2, 3), ((4, 5),), (0,)), Row((5, 6), ((7, 8, 9, 10),), (0,)), Row((7,), ((8,),), (0,))]
    batch = [Example(row, domain) for row, domain in zip(rows, (0, 1, 0), strict=True)]
    bias = model.model.norm.weight.requires_grad_(True)
    for head_only in (False, True):
        found = []
        for parts in ([batch], [[one] for one in batch]):
            bias.grad = None
            loss, tokens = step_loss(Scorer(model, head_only), parts)
            assert tokens == 13
            found.append((loss, bias.grad.clone()))
        wanted = (-_total(model, rows[0]) - _total(model, rows[2])) / 3 / 2 - _total(model, rows[1]) / 4 / 2
        assert abs(found[0][0] - wanted) < 1e-4 and abs(found[1][0] - wanted) < 1e-4
        assert torch.allclose(found[0][1], found[1][1], atol=1e-5)


def _total(model: LlamaForCausalLM, row: Row) -> float:
    """The log-probability of a row's answer, by the model's own logits."""
    ids = torch.tensor([row.layout()[0]])
    with torch.no_grad():
        found = model(input_ids=ids).logits[0].log_softmax(dim=-1)
    return sum(float(found[place, token]) for place, token, _ in row.predictions())


class Shift(nn.Module):
    """A bias on a model's last norm, to be learnt."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.weight = model.model.norm.weight
        self.weight.requires_grad_(True)


def course(tmp_path: Path, **changes: object) -> tuple[Training, torch.Tensor]:
    model = talker.tiny().requires_grad_(False)
    rows = [encode(talker.tokenizer(), load_task(one)) for one in tasks(tmp_path)]
    settings = replace(QUICK, **changes)
    made = Training(choose_scorer(model, rows[0]), Shift(model), rows, rows, settings, tmp_path / "state", "one")
    return made, model.model.norm.weight


def test_training_lowers_the_loss_and_keeps_the_best(tmp_path: Path) -> None:
    made, _ = course(tmp_path, steps=8)
    found = made.run()
    assert found.best < found.first and found.best == min(point.dev for point in found.curve if point.dev)
    assert mean_loss(made.scorer, made.dev) == pytest.approx(found.best, abs=1e-5)
    assert [point.dev is not None for point in found.curve] == [False, True] * 4
    rates = [point.rate for point in found.curve]
    assert 0 < rates[-1] < max(rates) == QUICK.rate


@pytest.mark.parametrize("steps", [1, 2, 10, 60])
def test_the_rate_rises_in_a_line_from_above_nothing_and_falls_by_a_cosine(steps: int) -> None:
    rise = -(-steps // 10)
    rates = [rate_at(step, rise, steps) for step in range(steps)]
    assert min(rates) > 0 and max(rates) == rates[rise - 1] == 1
    assert rates[:rise] == [(k + 1) / rise for k in range(rise)]
    assert all(later < sooner for sooner, later in zip(rates[rise:], rates[rise + 1 :], strict=False))


def test_a_training_ends_when_dev_no_longer_falls(tmp_path: Path) -> None:
    made, _ = course(tmp_path, steps=50, rate=50.0, every=1, patience=2)
    found = made.run()
    assert found.stopped and len(found.curve) < 50 and found.best == found.first


def test_an_interrupted_training_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole, wanted = course(tmp_path / "a", steps=6)
    whole.run()
    broken, _ = course(tmp_path / "b", steps=6)

    def stop(found: object, steps: int) -> None:
        if len(found.curve) == 3:  # after the state of step 2
            raise KeyboardInterrupt

    broken.told = stop
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    again, got = course(tmp_path / "b", steps=6)
    found = again.run()
    assert [point.step for point in found.curve] == [1, 2, 3, 4, 5, 6]
    assert torch.equal(got, wanted)
    other, _ = course(tmp_path / "b", steps=6)
    other.digest = "two"
    with pytest.raises(OutputError, match="holds a training of other models, data or settings"):
        other.run()


def test_a_full_disk_and_no_epochs_are_one_sentence(tmp_path: Path) -> None:
    made, _ = course(tmp_path, steps=2)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "state.pt.new").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="cannot be written .No space"):
        made.run()
    with pytest.raises(DataError, match="--epochs: got 0, expected a number above 0"):
        Settings(rate=0.1, epochs=0)


# From files to a merge


def tasks(root: Path) -> list[str]:
    root.mkdir(parents=True, exist_ok=True)
    texts = {
        "a": ("the cat sat", "two and two", "the mat", "four"),
        "b": ("Berlin is a city", "what is", "Paris", "no"),
    }
    for name, own in texts.items():
        lines = (json.dumps({"prompt": text, "answer": f" {text}!"}) + "\n" for text in own)
        (root / f"{name}.jsonl").write_text("".join(lines))
    return [str(root / f"{name}.jsonl") for name in texts]


@pytest.fixture
def experts(tmp_path: Path) -> dict[str, object]:
    """A base, three adapters of different ranks on it, the same as full models with norms of their own."""
    base = talker.tiny()
    base.save_pretrained(tmp_path / "base")
    talker.tokenizer().save_pretrained(tmp_path / "base")
    adapters, whole = [], []
    for k, name in enumerate(("one", "two", "three")):
        torch.manual_seed(k)
        config = LoraConfig(r=2 + k, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(talker.tiny(), config)
        model.save_pretrained(tmp_path / name)
        merged = model.merge_and_unload()
        merged.model.norm.weight.data.add_(0.1 * k)
        merged.save_pretrained(tmp_path / f"{name}-whole")
        talker.tokenizer().save_pretrained(tmp_path / f"{name}-whole")
        adapters.append(str(tmp_path / name))
        whole.append(str(tmp_path / f"{name}-whole"))
    return {"base": str(tmp_path / "base"), "adapters": adapters, "whole": whole, "tasks": tasks(tmp_path)}


def asked(experts: dict, method: str = "graft", models: str = "adapters", count: int = 2, **more: object) -> dict:
    told = {
        "method": method,
        "models": experts[models][:count],
        "base": experts["base"],
        "output": {"dtype": "float32"},
    }
    return {**told, "accept_base": models == "adapters", **more}


def logits(model: object) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 50, 60, 70, 80, 90, 100]])).logits[0]


CASES = {
    "adapters": ("graft", "adapters", 2, {}, {}),
    "three adapters": ("graft", "adapters", 3, {}, {"phi": "mlp", "sharpness": True}),
    "blocks": ("graft", "adapters", 2, {}, {"phi": "channelwise", "size": 8}),
    "elements": ("graft", "whole", 2, {}, {"phi": "affine", "size": 1}),
    "dense": ("graft", "whole", 2, {}, {"phi": "dense"}),
    "sharp": ("graft", "whole", 2, {"knobs": {"sharpness": 20}}, {"phi": "channelwise", "raw": True}),
    "spectral": ("graft", "adapters", 2, {"knobs": {"global_signal": "spectral"}}, {}),
    "convex": ("graft_convex", "whole", 3, {}, {}),
    "free": ("graft_free", "whole", 2, {"knobs": {"scale": 0.7}}, {}),
    "free adapters": ("graft_free", "adapters", 3, {}, {"prior": 0.5, "phi": "affine"}),
    "attention only": (
        "graft", "whole", 2, {"rules": [{"where": {"role": "mlp"}, "knobs": {"local_signal": "none"}}]}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_merge_by_trained_gates_is_the_live_fused_model(experts: dict, tmp_path: Path, case: str) -> None:
    method, models, count, more, form = CASES[case]
    recipe = graftkit.Recipe.model_validate(asked(experts, method, models, count, **more))
    found = train(
        recipe, tmp_path / "out", data=experts["tasks"], settings=QUICK, form=Form(**form), held_out=0, device="cpu"
    )
    assert found.change.mean > 1e-5 and len(found.course.curve) == 4
    graftkit.merge(found.recipe, tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    made = learnable(gated(recipe), Form(**form), "cpu")
    made.gating.load_state_dict(load_file(tmp_path / "out" / "phi.safetensors"), strict=False)
    with running(made, "cpu") as (live, _, layers):
        assert len(layers) == len(open_gates(tmp_path / "out" / "gates.safetensors").tensors)
        fused = logits(live)
    apart = (logits(merged) - fused).abs().max() / fused.abs().max()
    assert apart < 2e-5, apart


def test_a_training_may_end_in_an_adapter(experts: dict, tmp_path: Path) -> None:
    """By entropies of the products, without the base's weights."""
    from peft import PeftModel

    form = {"as": "adapter", "rank": "exact", "dtype": "float32"}
    told = asked(experts, knobs={"of": "product"}, output=form)
    recipe = graftkit.Recipe.model_validate(told)
    found = train(recipe, tmp_path / "out", data=experts["tasks"], settings=QUICK, held_out=0, device="cpu")
    graftkit.merge(found.recipe, tmp_path / "merged")
    base = LlamaForCausalLM.from_pretrained(experts["base"], dtype=torch.float32).eval()
    merged = PeftModel.from_pretrained(base, str(tmp_path / "merged")).merge_and_unload()
    made = learnable(gated(recipe), Form(), "cpu")
    made.gating.load_state_dict(load_file(tmp_path / "out" / "phi.safetensors"), strict=False)
    with running(made, "cpu") as (live, _, _):
        fused = logits(live)
    assert (logits(merged) - fused).abs().max() < 2e-5 * fused.abs().max()
    with pytest.raises(PlanError, match="not of their factors"):
        told |= {"knobs": {"of": "factors"}, "output": {"as": "adapter"}, "models": experts["adapters"][:1] * 2}
        gated(graftkit.Recipe.model_validate(told))


def test_training_may_start_from_a_solved_file(experts: dict, tmp_path: Path) -> None:
    from graftkit.improving.gates import solve

    recipe = graftkit.Recipe.model_validate(asked(experts, "graft_free"))
    solve(recipe, tmp_path / "solved", data=experts["tasks"], device="cpu")
    file = tmp_path / "solved" / "gates.safetensors"
    form, slow = Form(start=file), replace(QUICK, rate=1e-6)
    found = train(recipe, tmp_path / "out", data=experts["tasks"], settings=slow, form=form, held_out=0, device="cpu")
    first, last = open_gates(file), open_gates(tmp_path / "out" / "gates.safetensors")
    assert 0 < found.change.most < 1e-4
    for name in first.tensors:
        np.testing.assert_allclose(first.values(name), last.values(name), atol=1e-4)
    with pytest.raises(PlanError, match="holds gates by channel of 1; block of 8 is to be learnt"):
        learnable(gated(recipe), replace(form, size=8), "cpu")


def test_starts_and_models_that_cannot_be_learnt_from_are_refused(experts: dict, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="^--start: .*nope.safetensors"):
        learnable(
            gated(graftkit.Recipe.model_validate(asked(experts))), Form(start=tmp_path / "nope.safetensors"), "cpu"
        )
    for models in ("adapters", "whole"):
        twice = asked(experts, models=models) | {"models": experts[models][:1] * 2}
        with pytest.raises(PlanError, match="do not differ in any matrix"):
            learnable(gated(graftkit.Recipe.model_validate(twice)), Form(), "cpu")


def test_activations_that_are_made_again_change_nothing(experts: dict, tmp_path: Path) -> None:
    recipe = graftkit.Recipe.model_validate(asked(experts))
    curves = []
    for k, recompute in enumerate((False, True)):
        found = train(
            recipe, tmp_path / f"{k}", data=experts["tasks"], settings=QUICK, recompute=recompute, device="cpu"
        )
        curves.append([point.loss for point in found.course.curve])
    assert curves[0] == pytest.approx(curves[1], abs=1e-6)


@pytest.mark.parametrize("method", ["graft", "graft_free"])
def test_weights_may_learn_along_and_leave_as_adapters(experts: dict, tmp_path: Path, method: str) -> None:
    for place in experts["adapters"][:2]:
        config = Path(place) / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": experts["base"]}))
    recipe = graftkit.Recipe.model_validate(asked(experts, method))
    found = train(
        recipe,
        tmp_path / "out",
        data=experts["tasks"],
        settings=QUICK,
        form=Form(weights=True),
        device="cpu",
        held_out=0,
    )
    told = graftkit.recipes.recipe.load(found.recipe)
    assert told.method == ("graft_convex" if method == "graft" else method)
    held = [load_file(Path(entry.model) / "adapter_model.safetensors") for entry in told.models]
    were = [load_file(Path(place) / "adapter_model.safetensors") for place in experts["adapters"][:2]]
    assert [{k: v.shape for k, v in one.items()} for one in held] == [{k: v.shape for k, v in o.items()} for o in were]
    assert all(not torch.equal(one[k], other[k]) for one, other in zip(held, were, strict=True) for k in one)
    assert told.accept_base and not any("are applied to" in note for note in plan(told).notes)
    graftkit.merge(found.recipe, tmp_path / "merged")
    with pytest.raises(PlanError, match="lets factors of adapters learn along"):
        learnable(gated(graftkit.Recipe.model_validate(asked(experts, models="whole"))), Form(weights=True), "cpu")


def test_the_command_tells_how_far_the_weights_moved(experts: dict, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(asked(experts)))
    line = ["gates", "train", str(path), str(tmp_path / "out"), "--device", "cpu", "--steps", "3", "--held-out", "1"]
    for place in experts["tasks"]:
        line += ["--data", place]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    assert "w_b moved by" in done.output and "of 0.5" not in done.output
    assert "2 examples were held out for the dev loss" in done.output
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert len(record["course"]["curve"]) == 3 and record["settings"]["steps"] == 3
    told = CliRunner().invoke(app, [*line[:3], str(tmp_path / "other"), *line[4:], "--preset", "graft-lora", "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["settings"]["rate"] == PRESETS["graft-lora"].rate
    again = CliRunner().invoke(app, line)
    assert isinstance(again.exception, OutputError) and "exists already" in str(again.exception)
    wrong = CliRunner().invoke(app, [*line[:3], str(tmp_path / "wrong"), *line[4:], "--preset", "graft-lor"])
    assert isinstance(wrong.exception, DataError) and "graft-lora" in str(wrong.exception)


@pytest.mark.parametrize(("models", "by"), [("adapters", "solve"), ("whole", "train")])
def test_a_fold_goes_from_pair_to_pair(experts: dict, tmp_path: Path, models: str, by: str) -> None:
    """The last pair is what the first made, and the third model; adapters stay adapters, of ranks added up."""
    path = tmp_path / "recipe.yaml"
    (tmp_path / "c.jsonl").write_text('{"prompt": "four", "answer": " make"}\n{"prompt": "is", "answer": " it"}\n')
    path.write_text(json.dumps(asked(experts, "graft_convex", models, 3)))
    line = ["gates", "fold", str(path), str(tmp_path / "out"), "--device", "cpu", "--by", by, "--steps", "2"]
    for place in (*experts["tasks"], str(tmp_path / "c.jsonl")):
        line += ["--data", place]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    last = graftkit.recipes.recipe.load(tmp_path / "out" / "2" / "recipe.yaml")
    assert Path(last.models[0].model).parts[-2:] == ("1", "merged")
    graftkit.merge(last, tmp_path / "merged")
    first = open_gates(tmp_path / "out" / "1" / "gates.safetensors")
    second = open_gates(tmp_path / "out" / "2" / "gates.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    held = [load_file(Path(place) / "model.safetensors")[name].double() for place in experts["whole"]]
    w, v = (torch.from_numpy(own.values(name)[..., None]) for own in (first, second))
    wanted = v[0] * (w[0] * held[0] + w[1] * held[1]) + v[1] * held[2]
    got = load_file(tmp_path / "merged" / "model.safetensors")[name].double()
    assert torch.allclose(got, wanted, atol=1e-5)
    assert CliRunner().invoke(app, line).exit_code == 0
    for changed, what in (([*line, "--samples", "1"], "settings"), ([*line[:-1], experts["tasks"][0]], "data")):
        other = CliRunner().invoke(app, changed)
        assert isinstance(other.exception, OutputError) and f"another {what}" in str(other.exception)
    other = CliRunner().invoke(app, [*line[:3], experts["whole"][0], *line[4:]])
    assert isinstance(other.exception, OutputError) and "holds no fold" in str(other.exception)
    if models == "adapters":
        rank = json.loads((tmp_path / "out" / "1" / "merged" / "adapter_config.json").read_text())["r"]
        assert rank == 2 + 3
