"""The compiled twins against the float64 references, at the edges of their chunks, and the engine's own statistics.

That a twin agrees with its torch function to one unit of the output's last place is in the conformance suite.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from graftkit import methods
from graftkit.methods import kernels, parts
from graftkit.methods.random import Keyed, philox_uniform
from graftkit.testing import evaluation
from reference import cases as inputs
from reference.average import average
from reference.dare import dare
from reference.passthrough import passthrough
from reference.slerp import slerp
from reference.task_arithmetic import task_arithmetic
from reference.ties import kth_magnitude, ties

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
DTYPES = st.sampled_from([np.float64, np.float32])
SCALES = st.sampled_from([0.0, 0.25, 1.0, 2.0])


def run(name, case, dtype, rng=None, **knobs):
    """The compiled twin on a flattened case, [models, n]; its inputs are exact in float32."""
    method = methods.get(name)
    stack = case.models.reshape(case.count, -1)
    values = {
        "base": torch.tensor(case.base.reshape(-1).astype(dtype)),
        "models": torch.tensor(stack.astype(dtype)),
        "deltas": torch.tensor((stack - case.base.reshape(-1)).astype(dtype)),
        "rng": rng,
    }
    chosen = evaluation.settings(method, knobs)
    return evaluation.kernel_weights(method, {**values, **method.measured(values, chosen)}, chosen).numpy()


def assert_equal(got, want, case, gain):
    rounding = 1e-13 if got.dtype == np.float64 else 2e-7
    bound = rounding * case.largest * max(gain, 1.0)
    np.testing.assert_allclose(got, np.asarray(want).reshape(-1), rtol=10 * rounding, atol=bound)


@PROPERTY
@given(st.data(), DTYPES)
def test_average(data, dtype):
    case, normalize = data.draw(inputs.cases()), data.draw(st.booleans())
    weight = data.draw(inputs.weights(case.count))
    assume(not normalize or abs(sum(weight)) > 0.05)
    gain = sum(map(abs, weight)) / (abs(sum(weight)) if normalize else 1)
    got = run("average", case, dtype, weight=tuple(weight), normalize=normalize)
    assert_equal(got, average(case.models, weight, normalize), case, 4 * gain)


@PROPERTY
@given(st.data(), DTYPES)
def test_task_arithmetic(data, dtype):
    case, normalize, scale = data.draw(inputs.cases()), data.draw(st.booleans()), data.draw(SCALES)
    weight = data.draw(inputs.weights(case.count))
    assume(not normalize or abs(sum(weight)) > 0.05)
    got = run("task_arithmetic", case, dtype, weight=tuple(weight), scale=scale, normalize=normalize)
    gain = sum(map(abs, weight)) / (abs(sum(weight)) if normalize else 1)
    assert_equal(got, task_arithmetic(case.base, case.models, weight, scale, normalize), case, 8 * gain)


@PROPERTY
@given(st.data(), DTYPES)
def test_ties(data, dtype):
    """In multiples of 1/8 all sums are exact, so that both precisions elect the same signs."""
    case = data.draw(inputs.cases())
    weight, density = data.draw(inputs.eighths(case.count)), data.draw(inputs.densities(case.count))
    knobs = {
        "scale": data.draw(SCALES),
        "combine": data.draw(st.sampled_from(["mean", "sum"])),
        "weighted_election": data.draw(st.booleans()),
    }
    got = run("ties", case, dtype, weight=tuple(weight), density=tuple(density), **knobs)
    assert_equal(got, ties(case.base, case.models, weight, density, **knobs), case, 8 * 16 * case.count)


@PROPERTY
@given(st.data(), DTYPES)
def test_dare(data, dtype):
    case, rescale = data.draw(inputs.cases()), data.draw(st.booleans())
    weight, density = data.draw(inputs.eighths(case.count, low=0)), data.draw(inputs.densities(case.count))
    knobs = {"scale": data.draw(SCALES), "elect": data.draw(st.sampled_from(["none", "sign"]))}
    assume(knobs["elect"] == "none" or not rescale or dtype == np.float64)  # a quotient may tie in one precision only
    rng = Keyed(Keyed.of(seed=data.draw(st.integers(0, 9)), models=case.count).keys, data.draw(st.integers(0, 9)))
    uniform = rng.uniform(torch.tensor(case.models)).numpy()
    got = run("dare", case, dtype, rng, weight=tuple(weight), density=tuple(density), rescale=rescale, **knobs)
    want = dare(case.base, case.models, uniform, weight, density, rescale=rescale, **knobs)
    assert_equal(got, want, case, 100 * 8 * 2 * case.count)


@PROPERTY
@given(inputs.cases(count=st.just(2)), st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]), DTYPES)
def test_slerp(case, t, dtype):
    assert_equal(run("slerp", case, dtype, t=t), slerp(*case.models, t), case, 100)


@PROPERTY
@given(inputs.cases(count=st.integers(2, 3)), st.integers(0, 1), SCALES, DTYPES)
def test_passthrough(case, take, scale, dtype):
    got = run("passthrough", case, dtype, take=take, scale=scale)
    assert_equal(got, passthrough(case.models, take, scale), case, 1)


@pytest.mark.parametrize("size", [0, 1, kernels.CHUNK - 1, kernels.CHUNK, kernels.CHUNK + 1, 2 * kernels.CHUNK + 3])
@pytest.mark.parametrize("name", ["ties", "dare"])
def test_edges_of_chunks(name, size):
    """What a chunk leaves behind must not reach the next one."""
    draw = torch.Generator().manual_seed(size)
    base = torch.zeros(size, dtype=torch.float64)
    models = torch.randint(-4, 5, (3, size), generator=draw).double()
    given = {"base": base, "models": models, "deltas": models - base, "rng": Keyed.of(seed=1, models=3)}
    method, knobs = methods.get(name), {"density": 0.5, **({"elect": "sign"} if name == "dare" else {})}
    given |= method.measured(given, evaluation.settings(method, knobs))
    want = evaluation.weights(method, given, knobs)
    torch.testing.assert_close(evaluation.kernel_weights(method, given, knobs), want, rtol=1e-14, atol=1e-14)


def kept(rng, density, size):
    """Ones that DARE keeps, not rescaled."""
    out = np.empty(size)
    chosen = methods.get("dare").settings({"weight": (1.0,), "density": (density,), "rescale": False})
    kernels.dare(np.ones((1, size)), rng, np.ones(1), **chosen, out=out)
    return out


@pytest.mark.parametrize("density", [0.0, 2.0**-33, 2.0**-32, 0.1, 0.5, 1 - 2.0**-33, 1 - 2.0**-53, 1.0])
@pytest.mark.parametrize("start", [0, 1, 2, 3, 2047, 2**34 + 1])
def test_dare_keeps_the_same_entries_at_any_density_and_start(density, start):
    key, size = 12345, 3000
    out = kept(Keyed((key,), start), density, size)
    np.testing.assert_array_equal(out, (philox_uniform(key, start, size).numpy() < density).astype(float))


def test_dare_compares_like_the_reference_at_the_very_number():
    """A density equal to a number that is drawn drops that entry, one unit above keeps it: `<`, not `<=`."""
    key = 12345
    drawn = float(philox_uniform(key, 10, 1))
    for density, stays in [(drawn, 0.0), (drawn + 2.0**-32, 1.0), (drawn + 2.0**-45, 1.0), (drawn - 2.0**-45, 0.0)]:
        assert kept(Keyed((key,), 10), density, 1)[0] == stays, density


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """The steps of a merge of two models of tied, tiny, zero and huge deltas, larger than a block in one tensor."""
    from graftkit.recipes.plan import plan
    from graftkit.recipes.steps import BLOCK

    root, draw = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
    shapes = {"a.weight": (BLOCK // 512 + 3, 512), "b.weight": (5, 7), "c.bias": (3,)}
    base = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    grid = {name: (draw.integers(-40, 41, shape) / 8).astype(np.float32) for name, shape in shapes.items()}
    powers = {name: 2.0 ** draw.integers(-140, 100, shape) for name, shape in shapes.items()}
    wide = {name: (draw.standard_normal(p.shape) * p).astype(np.float32) for name, p in powers.items()}
    for name, tensors in (("base", base), ("grid", grid), ("wide", wide)):
        (root / name).mkdir()
        save_file(tensors, root / name / "model.safetensors")
        (root / name / "config.json").write_text(json.dumps({"model_type": "none"}))
    recipe = {"method": "ties", "base": str(root / "base"), "models": [str(root / "grid"), str(root / "wide")]}
    return plan(recipe), [np.concatenate([m[n].ravel() for n in shapes]).astype(np.float64) for m in (grid, wide)]


def opening(plan):
    from graftkit.execution.blocks import Reader

    return lambda step, space: Reader(step, plan.sources, space)


@pytest.mark.parametrize("density", [(0.2, 0.2), (0.0, 1.0), (1e-9, 0.999), (0.5, 0.013)])
def test_the_engine_selects_the_exact_threshold(steps, density):
    """Radix selection over blocks and tensors finds what a full sort finds, and counts what it keeps."""
    from graftkit.execution.blocks import Workspace
    from graftkit.execution.reductions import select

    plan, deltas = steps
    found = select(plan.steps, density, opening(plan), Workspace())
    for k, (delta, share) in enumerate(zip(deltas, density, strict=True)):
        want = 0.0 if share == 1 else kth_magnitude(delta, share)
        assert found.values[k] == np.float32(want)
        assert found.density[k] == pytest.approx((np.abs(delta) >= want).mean(), abs=1e-15)


def test_the_engine_selects_as_parts_does(steps):
    from graftkit.execution.blocks import Workspace
    from graftkit.execution.reductions import inner_products, select

    plan, deltas = steps
    stack = torch.from_numpy(np.stack(deltas))
    offset = 0
    for step in plan.steps:
        part = stack[:, offset : offset + step.elements]
        offset += step.elements
        for density in [(0.2, 0.2), (0.0, 1.0), (0.5, 0.001)]:
            found = select([step], density, opening(plan), Workspace())
            np.testing.assert_array_equal(found.values, parts.threshold_of(part, density).numpy())
        dots = parts.statistic("dots", part, {})
        for of_deltas in (True, False):  # the base is zero: both are the same
            got = inner_products(opening(plan)(step, Workspace()), of_deltas)
            np.testing.assert_allclose(got, dots, rtol=1e-12)
