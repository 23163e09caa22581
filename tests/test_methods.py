"""Every built-in method: the conformance suite, its float64 reference, and its worked examples."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from graftkit import methods
from graftkit.errors import RecipeError
from graftkit.methods import parts
from graftkit.methods.random import Keyed
from graftkit.testing import MethodConformance
from reference import cases as inputs
from reference.average import average
from reference.dare import dare
from reference.passthrough import passthrough
from reference.slerp import slerp
from reference.task_arithmetic import task_arithmetic
from reference.ties import ties, ties_model

pytest_plugins = ["pytester"]

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SCALES = st.sampled_from([0.0, 0.3, 1.0, 2.0])


class TestAverage(MethodConformance):
    method = "average"


class TestTaskArithmetic(MethodConformance):
    method = "task_arithmetic"


class TestTies(MethodConformance):
    method = "ties"


class TestDare(MethodConformance):
    method = "dare"


class TestSlerp(MethodConformance):
    method = "slerp"


class TestPassthrough(MethodConformance):
    method = "passthrough"

    def test_the_engine_agrees(self, tmp_path):
        """Of one model, for a plan refuses models of which nothing is taken."""
        self._merge_files(tmp_path, 1, with_base=True)


def test_every_built_in_method_runs_the_suite():
    built_in = {name for name in methods.names() if methods.get(name).function.__module__.startswith("graftkit.")}
    suite = re.compile(r'\(MethodConformance\):\n    method = "(\w+)"')
    tests = [path.read_text("utf-8") for path in Path(__file__).parent.glob("test_*.py")]
    assert built_in == {name for text in tests for name in suite.findall(text)}


def run(name, case, rng=None, **knobs):
    tensors = {"base": torch.tensor(case.base), "models": torch.tensor(case.models)}
    return methods.get(name).run(**tensors, rng=rng, **knobs).numpy()


def assert_equal(got, want, case, gain=1.0):
    assert got.shape == np.shape(want)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13 * case.largest * max(gain, 1.0))


@PROPERTY
@given(st.data())
def test_average_is_its_reference(data):
    case = data.draw(inputs.cases())
    weight, normalize = data.draw(inputs.weights(case.count)), data.draw(st.booleans())
    assume(not normalize or abs(sum(weight)) > 0.05)
    gain = sum(map(abs, weight)) / (abs(sum(weight)) if normalize else 1)
    got = run("average", case, weight=weight, normalize=normalize)
    assert_equal(got, average(case.models, weight, normalize), case, gain)


@PROPERTY
@given(st.data())
def test_task_arithmetic_is_its_reference(data):
    case = data.draw(inputs.cases())
    weight, scale, normalize = data.draw(inputs.weights(case.count)), data.draw(SCALES), data.draw(st.booleans())
    assume(not normalize or abs(sum(weight)) > 0.05)
    got = run("task_arithmetic", case, weight=weight, scale=scale, normalize=normalize)
    want = task_arithmetic(case.base, case.models, weight, scale, normalize)
    assert_equal(got, want, case, 2 * sum(map(abs, weight)) / (abs(sum(weight)) if normalize else 1))


@st.composite
def ties_knobs(draw, count):
    return {
        "weight": draw(inputs.weights(count)),
        "scale": draw(SCALES),
        "combine": draw(st.sampled_from(["mean", "sum"])),
        "weighted_election": draw(st.booleans()),
    }


@PROPERTY
@given(st.data(), st.booleans())
def test_ties_is_its_reference(data, rescale):
    case = data.draw(inputs.cases())
    density, knobs = data.draw(inputs.densities(case.count)), data.draw(ties_knobs(case.count))
    if rescale:  # scaled entries may sum to nearly zero: then rounding elects, and a mean divides by what is left
        assume(all(x > 0 for x in knobs["weight"]) and case.count == 1)
        knobs["rescale"] = True
    got = run("ties", case, density=density, **knobs)
    assert_equal(got, ties(case.base, case.models, density=density, **knobs), case, 2 * 20 * case.count)


@PROPERTY
@given(st.data())
def test_ties_of_a_whole_model_is_its_reference(data):
    count = data.draw(st.integers(1, 3))
    tensors = [data.draw(inputs.cases(st.just(count), st.sampled_from([(4,), (2, 3), (1,)]))) for _ in range(3)]
    density, knobs = data.draw(inputs.densities(count)), data.draw(ties_knobs(count))
    deltas = [torch.from_numpy(case.models - case.base) for case in tensors]
    threshold = parts.threshold_of(torch.cat([d.reshape(count, -1) for d in deltas], dim=1), density)
    function, whole = methods.get("ties").function, torch.ones(count, dtype=torch.float64)
    models = [[case.models[k] for case in tensors] for k in range(count)]
    wanted = ties_model([case.base for case in tensors], models, density=density, **knobs)
    for case, delta, want in zip(tensors, deltas, wanted, strict=True):
        got = case.base + function(delta, threshold, whole, density=density, scope="model", **knobs).numpy()
        assert_equal(got, want, case, 2 * 20 * count)


@PROPERTY
@given(st.data())
def test_dare_is_its_reference(data):
    case = data.draw(inputs.cases())
    density, weight = data.draw(inputs.densities(case.count)), data.draw(inputs.weights(case.count))
    knobs = {
        "scale": data.draw(SCALES),
        "elect": data.draw(st.sampled_from(["none", "sign"])),
        "normalize": data.draw(st.booleans()),
        "combine": data.draw(st.sampled_from(["mean", "sum"])),
        "weighted_election": data.draw(st.booleans()),
        "rescale": data.draw(st.booleans()),
        "rescale_by": data.draw(st.sampled_from(["chance", "l1"])),
    }
    exact = not knobs["rescale"] or knobs["rescale_by"] == "chance"
    assume(knobs["elect"] == "none" or exact)  # scaled entries may sum to nearly zero: then rounding elects
    rng = Keyed.of(seed=data.draw(st.integers(0, 9)), models=case.count)
    uniform = rng.uniform(torch.tensor(case.models)).numpy()
    got = run("dare", case, rng, weight=weight, density=density, **knobs)
    want = dare(case.base, case.models, uniform, weight, density, **knobs)
    assert_equal(got, want, case, 100 * 2 * 20 * case.count)


@PROPERTY
@given(inputs.cases(count=st.just(2)), st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]))
def test_slerp_is_its_reference(case, t):
    assert_equal(run("slerp", case, t=t), slerp(*case.models, t), case, 100)


@PROPERTY
@given(st.data())
def test_passthrough_is_its_reference(data):
    case = data.draw(inputs.cases())
    take, scale = data.draw(st.integers(0, case.count - 1)), data.draw(SCALES)
    assert_equal(run("passthrough", case, take=take, scale=scale), passthrough(case.models, take, scale), case)


# What the papers and the peers say in numbers


def merged(name, base, models, **knobs):
    tensors = {"base": torch.tensor(base, dtype=torch.float64), "models": torch.tensor(models, dtype=torch.float64)}
    return methods.get(name).run(**tensors, **knobs).tolist()


def test_worked_examples():
    assert merged("average", 0.0, [1.0, 2.0, 4.0], weight=[1, 1, 2]) == 2.75
    assert merged("task_arithmetic", 1.0, [3.0, 0.0], scale=0.3) == pytest.approx(1.3)
    rows = [[4.0, -3, 1, 0, 2, -5], [1.0, 5, -2, 0, -2, -1], [-2.0, 1, 6, 3, 0, -4]]
    assert merged("ties", [0.0] * 6, rows, density=1.0) == pytest.approx([2.5, 3, 3.5, 3, 2, -10 / 3])
    assert merged("ties", [0.0] * 6, rows, density=0.5) == pytest.approx([4, 5, 6, 3, -2, -4.5])
    assert merged("slerp", [0.0, 0], [[1.0, 0], [0, 3.0]]) == pytest.approx([0.5**0.5, 3 * 0.5**0.5])
    assert merged("passthrough", 0.0, [1.0, 2.0], take=1, scale=3) == 6.0


def test_identities_of_one_model_and_of_copies():
    base, model = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    rng = Keyed.of(seed=0, models=3)
    whole = {"density": 1.0}
    for name, knobs in [("average", {}), ("task_arithmetic", {}), ("ties", whole), ("dare", whole)]:
        alone = methods.get(name).run(base=base, models=model[None], rng=Keyed.of(seed=0, models=1), **knobs)
        torch.testing.assert_close(alone, model, msg=f"{name}: one model")
    copies = model.expand(3, 4, 5)
    for name, knobs in [("average", {}), ("ties", whole), ("task_arithmetic", {"weight": 1 / 3})]:
        torch.testing.assert_close(methods.get(name).run(base=base, models=copies, rng=rng, **knobs), model)
    torch.testing.assert_close(methods.get("slerp").run(models=copies[:2], t=0.3), model)


def test_averages_do_not_depend_on_the_base():
    shift, models = torch.randn(4, 5, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    moved = methods.get("average").run(models=models + shift, weight=[1, 2, 3])
    torch.testing.assert_close(moved, methods.get("average").run(models=models, weight=[1, 2, 3]) + shift)


@pytest.mark.parametrize("name", ["average", "task_arithmetic", "slerp"])
def test_methods_that_say_so_commute_with_rotations(name):
    assert methods.get(name).rotations == "both"
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (4, 5))
    base, models = torch.randn(4, 5, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    turned = methods.get(name).run(base=left @ base @ right, models=left @ models @ right)
    torch.testing.assert_close(turned, left @ methods.get(name).run(base=base, models=models) @ right)


# The same through files, for the share that is counted over a whole model


def test_ties_of_a_whole_model_through_the_engine(tmp_path):
    from graftkit.execution.local import execute
    from graftkit.recipes.plan import plan

    draw = np.random.default_rng(0)
    shapes = {"layers.0.mlp.up_proj.weight": (6, 4), "layers.1.mlp.up_proj.weight": (5, 3), "norm.weight": (7,)}
    spread = dict(zip(shapes, (1.0, 0.1, 3.0), strict=True))
    base = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    def tune():
        deltas = {name: draw.integers(-8, 9, shape) / 8 * spread[name] for name, shape in shapes.items()}
        return {name: (base[name] + delta).astype(np.float32) for name, delta in deltas.items()}

    tuned = [tune(), tune()]
    for directory, tensors in zip(("base", "one", "two"), (base, *tuned), strict=True):
        (tmp_path / directory).mkdir()
        save_file(tensors, tmp_path / directory / "model.safetensors")
        (tmp_path / directory / "config.json").write_text(json.dumps({"model_type": "none"}))
    recipe = {
        "method": "ties",
        "base": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "one"), "weight": 0.6}, {"model": str(tmp_path / "two"), "weight": 0.3}],
        "knobs": {"density": 0.29, "scope": "model"},
    }
    execute(plan(recipe), tmp_path / "out", workers=2)
    got = load_file(tmp_path / "out" / "model.safetensors")
    wide = [[tensors[name].astype(np.float64) for name in shapes] for tensors in (base, *tuned)]
    want = ties_model(wide[0], wide[1:], [0.6, 0.3], [0.29, 0.29])
    for name, tensor in zip(shapes, want, strict=True):
        np.testing.assert_allclose(got[name], tensor, rtol=1e-6, atol=1e-9)


# What `run` refuses


def test_run_refuses_what_cannot_be_meant():
    models = torch.zeros(3, 2)
    with pytest.raises(RecipeError, match="did you mean 'density'"):
        methods.get("ties").run(base=models[0], models=models, densty=0.5)
    with pytest.raises(RecipeError, match="needs a base"):
        methods.get("ties").run(models=models)
    with pytest.raises(RecipeError, match="did you mean 'ties'"):
        methods.get("tiess")
    with pytest.raises(RecipeError, match="exactly 2 models, got 3"):
        methods.get("slerp").run(models=models)
    with pytest.raises(RecipeError, match=r"density.*\[0, 1\]"):
        methods.get("ties").run(base=models[0], models=models, density=1.5)
    with pytest.raises(RecipeError, match="did you mean 'sign'"):
        methods.get("dare").run(base=models[0], models=models, rng=Keyed.of(seed=0, models=3), elect="sgn")
    with pytest.raises(RecipeError, match="rng"):
        methods.get("dare").run(base=models[0], models=models)
    with pytest.raises(ValueError, match="take is 3, but there are 3 models"):
        methods.get("passthrough").run(models=models, take=3)
    with pytest.raises(ValueError, match="2 values for 3 models"):
        methods.get("average").run(models=models, weight=[0.5, 0.5])


# The suite itself


def test_the_suite_finds_broken_promises(pytester, monkeypatch):
    """Each method of `reference/broken.py` breaks one promise, and the test of that promise fails for it."""
    monkeypatch.setattr(methods, "_REGISTRY", dict(methods._REGISTRY))
    from reference.broken import BREAKS, SOUND

    pytester.makepyfile(test_broken="from reference.broken import *")
    nodes = [f"test_broken.py::{suite}::{promise}" for suite, promise in BREAKS.items()]
    nodes += [f"test_broken.py::{suite}" for suite in SOUND]
    report = pytester.inline_run("-p", "no:cacheprovider", "--tb=no", *nodes)
    failed = {tuple(item.nodeid.partition("[")[0].split("::")[1:]) for item in report.getfailures()}
    assert failed == set(BREAKS.items())
