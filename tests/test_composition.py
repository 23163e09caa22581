"""Preparations and finishers: the conformance suite, the float64 references, and composed merges of files."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import graftkit
import tiny
from graftkit.errors import PlanError, RecipeError
from graftkit.execution import blocks
from graftkit.methods import composition, get
from graftkit.methods.random import Keyed
from graftkit.recipes.explain import summary
from graftkit.testing import FinisherConformance, PreparationConformance
from reference import cases as inputs
from reference import composition as reference


class TestTrim(PreparationConformance):
    part = "trim"


class TestDare(PreparationConformance):
    part = "dare"


class TestBreadcrumbs(PreparationConformance):
    part = "breadcrumbs"
    knobs: ClassVar = {"density": 0.5, "outliers": 0.1}


class TestMagprune(PreparationConformance):
    part = "magprune"


class TestRescale(FinisherConformance):
    part = "rescale"


class TestSvc(FinisherConformance):
    part = "svc"

    def test_gradients_are_finite(self):
        """A merged delta of several equal singular values has no gradient of its directions: nothing to promise."""


PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def prepared(name, case, rng=None, **knobs):
    deltas = torch.tensor(case.models - case.base)
    part = composition.get_part("preparation", name)
    values = part.settings(knobs)
    given = {"deltas": deltas, "rng": rng} | part.measured({"deltas": deltas}, values)
    return part.function(*(given[read] for read in part.reads), **values).numpy()


def assert_equal(got, want, case, gain=1.0):
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11 * case.largest * max(gain, 1.0))


def drawn(case):
    rng = Keyed.of(seed=3, models=case.count)
    return rng, list(rng.uniform(torch.tensor(case.models)).numpy())


@PROPERTY
@given(st.data())
def test_preparations_are_their_references(data):
    case = data.draw(inputs.cases())
    density, other = (data.draw(inputs.densities(case.count)) for _ in range(2))
    deltas, (rng, uniform) = list(case.models - case.base), drawn(case)
    assert_equal(prepared("trim", case, density=density), reference.trim(deltas, density), case)
    crumbs = prepared("breadcrumbs", case, density=density, outliers=other)
    assert_equal(crumbs, reference.breadcrumbs(deltas, density, other), case)
    for rescale in (True, False):
        got = prepared("dare", case, rng, density=density, rescale=rescale)
        assert_equal(got, reference.dare(deltas, uniform, density, rescale), case, 100)
        window = [share / 2 for share in other]
        got = prepared("magprune", case, rng, density=density, epsilon=window, rescale=rescale)
        assert_equal(got, reference.magprune(deltas, uniform, density, window, rescale), case, 1000)


@pytest.mark.parametrize("shape", [(1, 1), (6, 4), (3, 9), (8, 8), (5,), (2, 3, 4), ()])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_svc_is_its_reference(shape, alpha):
    draw = np.random.default_rng(len(shape) + int(8 * alpha))
    deltas = draw.standard_normal((3, *shape))
    deltas[2] *= 0
    merged = deltas.sum(axis=0)
    got = composition.finished(torch.tensor(merged), torch.tensor(deltas), [("svc", {"alpha": alpha})])
    np.testing.assert_allclose(got.numpy(), reference.svc(merged, list(deltas), alpha), rtol=1e-9, atol=1e-11)


@PROPERTY
@given(inputs.cases(), st.sampled_from(["mean", "itself"]), st.sampled_from([0.0, 0.3, 1.0, -1.0]))
def test_rescale_is_its_reference(case, to, factor):
    deltas = case.models - case.base
    merged = deltas.sum(axis=0)
    got = composition.finished(torch.tensor(merged), torch.tensor(deltas), [("rescale", {"to": to, "factor": factor})])
    assert_equal(got.numpy(), reference.rescale(merged, deltas, to, factor), case, len(deltas))


def test_svc_shrinks_what_all_share_and_leaves_what_one_has_alone():
    shared, alone = torch.outer(torch.eye(4)[0], torch.eye(4)[0]), torch.outer(torch.eye(4)[1], torch.eye(4)[1])
    deltas = torch.stack([shared, shared + alone])
    merged = composition.finished(deltas.sum(dim=0), deltas, ["svc"])
    torch.testing.assert_close(merged, shared + alone)


# Merges of files

CHAINS = {
    "trim": ("ties", [{"trim": {"density": [0.3, 0.6]}}], []),
    "dare": ("ties", [{"dare": {"density": 0.5}}], []),
    "two that draw": ("dare", ["dare", {"magprune": {"density": 0.7}}], []),
    "of weights": ("average", [{"breadcrumbs": {"density": 0.5, "outliers": 0.1}}, "dare"], ["rescale"]),
    "slerp": ("slerp", [{"trim": {"density": 0.5}}], []),
    "finished": ("task_arithmetic", [], ["svc", {"rescale": {"factor": 0.5}}]),
    "whole": ("task_arithmetic", [{"magprune": {"epsilon": 0.2}}], ["rescale", "svc"]),
    "base too": ("arcee_fusion", [{"trim": {"density": 0.5}}], []),
}


@pytest.fixture
def family(tmp_path):
    return tiny.family(tmp_path)


def recipe(family, method="task_arithmetic", prepare=(), finish=(), **more):
    models = [str(path) for path in family[1 : 2 if method == "arcee_fusion" else 3]]
    return {"method": method, "base": str(family[0]), "models": models, "prepare": list(prepare),
            "finish": list(finish), **more}  # fmt: skip


def merged(made, out, **options):
    graftkit.merge(made, out, **options)
    return load_file(out / "model.safetensors")


def pairs(steps):
    return [(step, {}) if isinstance(step, str) else next(iter(step.items())) for step in steps]


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_engine_does_what_whole_tensors_say(tmp_path, monkeypatch, chain, dtype):
    monkeypatch.setattr(blocks, "BLOCK", 64)
    family = tiny.family(tmp_path, dtype=dtype)
    method, prepare, finish = CHAINS[chain]
    made = graftkit.plan(recipe(family, method, prepare, finish))
    got = merged(made.recipe, tmp_path / "out", workers=2)
    base, *models = (load_file(path / "model.safetensors") for path in family)
    for step in made.steps:
        stack = torch.stack([m[step.name].double() for m in models[: len(step.models)]])
        keys = next((a.keys for a in step.prepare if a.keys), step.keys)
        after = [pair for pair in pairs(finish) if pair[0] in [applied.name for applied in step.finish]]
        wanted = composition.run(
            method, base=base[step.name].double(), models=stack, prepare=pairs(prepare), finish=after,
            rng=Keyed(keys) if keys else None,
        )  # fmt: skip
        size = base[step.name].double().abs().max()
        close = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
        assert float((got[step.name].double() - wanted).abs().max()) <= close * float(size), step.name


@pytest.mark.parametrize(
    ("method", "other", "knobs"),
    [
        ("dare", "task_arithmetic", {"density": 0.3}),
        ("dare", "task_arithmetic", {"density": [0.2, 0.9], "rescale": False}),
        ("ties", "ties", {"density": 0.3}),
        ("breadcrumbs", "task_arithmetic", {"density": 0.5, "outliers": 0.05}),
    ],
)
def test_a_method_is_its_preparation_and_the_rest(tmp_path, family, method, other, knobs):
    name = "trim" if method == "ties" else method
    whole = merged(recipe(family, method, knobs={**knobs, "weight": [0.7, 0.4]}), tmp_path / "a")
    rest = {"weight": [0.7, 0.4]} | ({"density": 1.0} if other == "ties" else {})
    parts = merged(recipe(family, other, [{name: knobs}], knobs=rest), tmp_path / "b")
    for key, one in whole.items():  # DARE rounds once, a preparation's deltas are float32: a unit here and there
        other_way = parts[key]
        apart = one != other_way
        near = (one.float() - other_way.float()).abs() <= 2**-7 * one.float().abs()
        assert bool(near.all()) and int(apart.sum()) <= (one.numel() // 1000 + 1 if method == "dare" else 0), key


def test_della_is_magprune_and_an_election(tmp_path, family):
    whole = merged(recipe(family, "della"), tmp_path / "a")
    parts = merged(recipe(family, "ties", ["magprune"], knobs={"density": 1.0}), tmp_path / "b")
    for name, tensor in whole.items():  # della computes by torch, ties compiled
        torch.testing.assert_close(tensor, parts[name], rtol=2.0**-7, atol=0)


def test_a_trim_over_the_whole_model_is_that_of_ties(tmp_path, family):
    whole = merged(recipe(family, "ties", knobs={"density": 0.3, "scope": "model"}), tmp_path / "a")
    made = recipe(family, "ties", [{"trim": {"density": 0.3, "scope": "model"}}], knobs={"density": 1.0})
    parts = merged(made, tmp_path / "b", workers=2)
    assert graftkit.plan(made).stages == ("statistics", "merge")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize("chain", CHAINS)
def test_workers_and_memory_change_no_byte(tmp_path, monkeypatch, family, chain):
    monkeypatch.setattr(blocks, "BLOCK", 64)
    made = recipe(family, *CHAINS[chain])
    one = merged(made, tmp_path / "one", workers=1)
    many = merged(made, tmp_path / "many", workers=4, memory=2 << 30)
    assert all(torch.equal(one[key], many[key]) for key in one)


@pytest.mark.parametrize("chain", [name for name in CHAINS if "rescale" not in str(CHAINS[name]) and name != "slerp"])
def test_blocks_change_no_byte(tmp_path, monkeypatch, family, chain):
    """Where no statistic is a sum: sums are defined over the engine's blocks."""
    made = recipe(family, *CHAINS[chain])
    large = merged(made, tmp_path / "large")
    monkeypatch.setattr(blocks, "BLOCK", 48)
    small = merged(made, tmp_path / "small")
    assert all(torch.equal(large[key], small[key]) for key in large)


def test_a_second_that_draws_has_masks_of_its_own(family):
    made = graftkit.plan(recipe(family, "dare", ["dare", {"trim": {"density": 0.9}}, "magprune"]))
    step = made.steps[1]
    keys = [step.prepare[0].keys, step.prepare[2].keys, step.keys]
    assert step.prepare[1].keys == ()
    assert len({key for each in keys for key in each}) == 6
    assert keys[0] == graftkit.plan(recipe(family, "dare")).steps[1].keys


def test_prepared_weights_are_the_base_and_what_is_left(tmp_path, family):
    """A method of weights sees the base where everything was dropped."""
    nothing = merged(recipe(family, "average", [{"trim": {"density": 0}}]), tmp_path / "out")
    base = load_file(family[0] / "model.safetensors")
    assert all(torch.equal(nothing[key], base[key]) for key in base)


def test_rules_replace_what_stands_around_the_method(tmp_path, family):
    rules = [
        {"where": {"role": "mlp"}, "prepare": [], "finish": ["svc"]},
        {"where": {"layers": 1}, "prepare": [{"trim": {"density": {"gradient": [0.2, 0.6]}}}]},
    ]
    made = graftkit.plan(recipe(family, prepare=["dare"], rules=rules))
    found = {step.name: ([a.name for a in step.prepare], [a.name for a in step.finish]) for step in made.steps}
    assert found["model.layers.0.mlp.up_proj.weight"] == ([], ["svc"])
    assert found["model.layers.1.mlp.up_proj.weight"] == (["trim"], ["svc"])
    assert found["model.layers.0.self_attn.q_proj.weight"] == (["dare"], [])
    trimmed = next(step for step in made.steps if step.name == "model.layers.1.mlp.up_proj.weight")
    assert trimmed.prepare[0].knobs["density"] == (0.6, 0.6)


def test_svc_leaves_vectors_and_embeddings_alone(family):
    made = graftkit.plan(recipe(family, finish=["svc"]))
    assert {step.name for step in made.steps if step.finish} == {
        step.name for step in made.steps if len(step.shape) == 2 and "embed" not in step.name
    }


def test_the_plan_and_the_record_say_so(tmp_path, family):
    plain, trimmed = (graftkit.plan(recipe(family, prepare=p)) for p in ([], [{"trim": {"density": 0.25}}]))
    other = graftkit.plan(recipe(family, prepare=[{"trim": {"density": 0.5}}]))
    assert len({plain.hash, trimmed.hash, other.hash}) == 3
    told = summary(trimmed)["groups"][0]
    assert told["prepare"] == [{"name": "trim", "knobs": {"density": (0.25, 0.25), "scope": "tensor"}}]
    record = graftkit.merge(recipe(family, prepare=[{"trim": {"density": 0.25}}], finish=["svc"]), tmp_path / "out")
    assert record["recipe"]["prepare"] == [{"trim": {"density": 0.25}}]
    line = next(t for t in record["tensors"] if t["name"].endswith("q_proj.weight"))
    assert line["prepare"][0]["name"] == "trim" and line["finish"] == ["svc"]
    assert all(0.25 <= share < 0.5 for share in line["prepare"][0]["density"])
    assert graftkit.plan(record["recipe_yaml"]).hash == graftkit.plan(record["recipe"]).hash


def test_adapters_are_prepared_without_their_bases_weights_being_written_out(tmp_path, family):
    lora = tiny.adapter(tmp_path / "lora", 5)
    made = {"method": "task_arithmetic", "base": str(family[0]), "models": [str(lora)], "accept_base": True}
    sparse = merged({**made, "prepare": [{"trim": {"density": 0.1}}]}, tmp_path / "out")
    base = load_file(family[0] / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    changed = (sparse[name] != base[name]).float().mean()
    assert 0 < float(changed) <= 0.12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prepare": ["trimm"]}, r"recipe\.prepare\[0\]: unknown preparation 'trimm'; did you mean 'trim'\?"),
        ({"prepare": [{"trim": {"densty": 1}}]}, r"recipe\.prepare\[0\]: unknown knob of trim 'densty'; did you mean"),
        ({"prepare": [{"trim": {"density": 2}}]}, r"recipe\.prepare\[0\]\.density: got 2, expected number in \[0, 1\]"),
        ({"prepare": [{"trim": {"density": [0.1]}}]}, r"prepare\[0\]\.density: 1 values for 2 models"),
        ({"prepare": {"trim": {}}}, r"prepare: got \{'trim': \{\}\}, expected a list of steps"),
        ({"prepare": [{"trim": {}, "dare": {}}]}, r"expected a name, or one with its knobs"),
        ({"finish": ["trim"]}, r"recipe\.finish\[0\]: unknown finisher 'trim'; known: .*rescale"),
        (
            {"rules": [{"where": {"role": "mlp"}, "finish": ["scv"]}]},
            r"rules\[0\]\.finish\[0\]: unknown finisher 'scv'",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(family, change, message):
    with pytest.raises(RecipeError, match=message):
        graftkit.plan(recipe(family) | change)


@pytest.mark.parametrize(("section", "name"), [("prepare", "dare"), ("finish", "rescale")])
def test_without_a_base_there_are_no_deltas(family, section, name):
    made = {"method": "average", "models": [str(family[1]), str(family[2])], section: [name]}
    with pytest.raises(PlanError, match=rf"recipe\.{section}: {name} works on deltas .* name it as `base:`"):
        graftkit.plan(made)


def test_an_interrupted_merge_keeps_the_thresholds_of_preparations(tmp_path, family, monkeypatch):
    made = recipe(
        family, "average", [{"trim": {"density": 0.3, "scope": "model"}}, {"trim": {"density": 0.5, "scope": "model"}}]
    )
    whole = merged(made, tmp_path / "whole", workers=1)
    from graftkit.execution import local

    done, cast = [], local.cast

    def failing(*given):
        done.append(given)
        if len(done) > 5:
            raise KeyboardInterrupt
        return cast(*given)

    monkeypatch.setattr(local, "cast", failing)
    with pytest.raises(KeyboardInterrupt):
        graftkit.merge(made, tmp_path / "again", workers=1)
    monkeypatch.setattr(local, "cast", cast)
    monkeypatch.setattr(local.reductions, "select", None)
    again = merged(made, tmp_path / "again", workers=1)
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_random_methods_ask_for_a_stream():
    base, models = torch.zeros(4), torch.ones(2, 4)
    with pytest.raises(RecipeError, match="draws random numbers"):
        composition.run("task_arithmetic", base=base, models=models, prepare=["dare"])
    assert get("average").run(base=None, models=models).equal(torch.ones(4))
