"""Fisher, RegMean and the regression in a core space: promises, references, fusion-bench's numbers, invariants."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftkit import methods
from graftkit.errors import RecipeError
from graftkit.testing import MethodConformance
from oracles.test_oracles import FUSION_BENCH
from reference import curvature

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)


class TestFisher(MethodConformance):
    method = "fisher"


class TestRegmean(MethodConformance):
    method = "regmean"


class TestRegmeanPlus(MethodConformance):
    method = "regmean_plus"


class TestCoreRegmean(MethodConformance):
    method = "core_regmean"

    def test_the_engine_agrees(self) -> None:
        """Its files are of features, not of inputs: `test_statistics.py` compares merges with the function."""


def drawn(seed: int, count: int, out: int = 4, width: int = 6, tokens: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Models [models, out, in], and the inputs of each one's domain [models, tokens, in]."""
    source = np.random.default_rng(seed)
    return source.standard_normal((count, out, width)), source.standard_normal((count, tokens, width))


def grams_of(inputs: np.ndarray) -> np.ndarray:
    return np.einsum("tki,tkj->tij", inputs, inputs) / inputs.shape[1]


def roots_of(inputs: np.ndarray) -> np.ndarray:
    return inputs / np.sqrt(inputs.shape[1])


def run(name: str, models: np.ndarray, **given_: object) -> np.ndarray:
    tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in given_.items()}
    base = torch.zeros(models.shape[1:], dtype=torch.float64)
    return methods.get(name).run(base=base, models=torch.from_numpy(models), **tensors).numpy()


@PROPERTY
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([0.0, 0.1, 0.9, 1.0]), st.sampled_from([1e-9, 1e-3]))
def test_regmean_is_its_reference(seed: int, count: int, alpha: float, ridge: float) -> None:
    models, inputs = drawn(seed, count)
    weight = list(np.random.default_rng(seed).uniform(0.1, 2, count))
    got = run("regmean", models, gram=grams_of(inputs), alpha=alpha, ridge=ridge, weight=weight)
    np.testing.assert_allclose(got, curvature.regmean(models, grams_of(inputs), weight, alpha, ridge), atol=1e-8)


@PROPERTY
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([1e-9, 1e-6, 0.1]))
def test_fisher_is_its_reference(seed: int, count: int, floor: float) -> None:
    models, _ = drawn(seed, count)
    source = np.random.default_rng(seed)
    information, weight = source.exponential(size=models.shape) ** 3, list(source.uniform(0.1, 2, count))
    got = run("fisher", models, fisher=information, floor=floor, weight=weight)
    np.testing.assert_allclose(got, curvature.fisher(models, information, weight, floor), atol=1e-10)


@PROPERTY
@given(
    st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([1e-6, 1e-4, 1e-1]), st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([1, 3, 9]),
)  # fmt: skip
def test_core_regression_is_its_reference(seed: int, count: int, ridge: float, balance: float, features: int) -> None:
    """With fewer, and with more measured directions than there are inputs."""
    models, _ = drawn(seed, count)
    source = np.random.default_rng(seed)
    roots, weight = source.standard_normal((count, features, 6)), list(source.uniform(0.1, 2, count))
    got = run("core_regmean", models, core_gram=roots, ridge=ridge, balance=balance, weight=weight, outside=0.7)
    np.testing.assert_allclose(got, curvature.core_regmean(models, roots, weight, ridge, balance, 0.7), atol=1e-7)


@pytest.mark.parametrize("case", [case for case in FUSION_BENCH.about["cases"] if case.startswith("regmean")])
def test_regmean_is_fusion_benchs(case: str) -> None:
    """Theirs has no ridge, so ours is as small as it may be."""
    models, grams = (
        torch.stack([FUSION_BENCH.input(case, f"{n}{k}") for k in range(3)]).double() for n in ("w", "gram")
    )
    alpha = FUSION_BENCH.parameters(case)["reduce_non_diagonal_ratio"]
    merged = methods.get("regmean").run(models=models, gram=grams, alpha=alpha, ridge=1e-12)
    FUSION_BENCH.check(case, merged, "weight")


@pytest.mark.parametrize("case", [case for case in FUSION_BENCH.about["cases"] if case.startswith("fisher")])
def test_fisher_is_fusion_benchs(case: str) -> None:
    """Theirs divides by norms in the coefficients, which are ours for the weights."""
    knobs = FUSION_BENCH.parameters(case)
    held = {n: [FUSION_BENCH.input(case, f"F_{n}{k}").double() for k in range(3)] for n in "ab"}
    weight = np.array(knobs["coefficients"])
    if knobs["normalize_fisher_weight"]:
        norms = [float(sum(held[n][k].square().sum() for n in "ab")) ** 0.5 for k in range(3)]
        weight = weight / (np.array(norms) + knobs["minimal_fisher_weight"])
    for name in "ab":
        models = torch.stack([FUSION_BENCH.input(case, f"{name}{k}") for k in range(3)]).double()
        merged = methods.get("fisher").run(
            models=models, fisher=torch.stack(held[name]), weight=weight.tolist(), floor=knobs["minimal_fisher_weight"]
        )
        FUSION_BENCH.check(case, merged, name)


@pytest.mark.parametrize("name", ["regmean", "core_regmean"])
def test_equal_moments_give_the_mean_and_equal_models_themselves(name: str) -> None:
    models, inputs = drawn(3, 3)
    kind, of, knobs = {"regmean": ("gram", grams_of, {}), "core_regmean": ("core_gram", roots_of, {"balance": 0.0})}[
        name
    ]
    equal = np.repeat(of(inputs)[:1], 3, axis=0)
    np.testing.assert_allclose(run(name, models, **{kind: equal}, **knobs), models.mean(axis=0), atol=1e-9)
    same = np.repeat(models[:1], 3, axis=0)
    np.testing.assert_allclose(run(name, same, **{kind: of(inputs)}), models[0], atol=1e-9)
    np.testing.assert_allclose(run(name, models[:1], **{kind: of(inputs)[:1]}), models[0], atol=1e-9)


def test_one_models_moments_alone_give_that_model() -> None:
    models, inputs = drawn(4, 2)
    grams = grams_of(inputs) * np.array([1.0, 0.0])[:, None, None]
    np.testing.assert_allclose(run("regmean", models, gram=grams, ridge=1e-12, alpha=1.0), models[0], atol=1e-7)


def test_columns_of_uncorrelated_inputs_are_averaged_by_their_squares() -> None:
    models, inputs = drawn(5, 2)
    grams = grams_of(inputs)
    squares = np.einsum("tii->ti", grams)
    wanted = (models * squares[:, None]).sum(axis=0) / squares.sum(axis=0)
    np.testing.assert_allclose(run("regmean", models, gram=grams, alpha=0.0, ridge=1e-12), wanted, atol=1e-9)


def test_adapters_that_never_fire_on_each_others_inputs_add_up() -> None:
    source = np.random.default_rng(6)
    deltas, inputs = np.zeros((2, 5, 8)), np.zeros((2, 50, 8))
    for k, part in enumerate((slice(0, 4), slice(4, 8))):
        deltas[k, :, part] = source.standard_normal((5, 2)) @ source.standard_normal((2, 4))
        inputs[k, :, part] = source.standard_normal((50, 4))
    got = run("core_regmean", deltas, core_gram=roots_of(inputs), ridge=1e-9)
    np.testing.assert_allclose(got, deltas.sum(axis=0), atol=1e-6)


def test_core_regression_commutes_with_rotations() -> None:
    models, inputs = drawn(7, 2)
    left, right = (np.linalg.qr(np.random.default_rng(k).standard_normal((n, n)))[0] for k, n in enumerate((4, 6)))
    got = run("core_regmean", left @ models @ right.T, core_gram=roots_of(inputs @ right.T))
    np.testing.assert_allclose(got, left @ run("core_regmean", models, core_gram=roots_of(inputs)) @ right.T, atol=1e-9)


def test_a_balanced_regression_is_the_same_for_a_model_that_is_louder_in_all() -> None:
    """With balance 1 a model's inputs may be of any size: what it loses is a share of its own answers."""
    models, inputs = drawn(10, 2)
    louder = inputs * np.array([1.0, 7.0])[:, None, None]
    one, other = (
        run("core_regmean", models, core_gram=roots_of(x), balance=1.0, ridge=1e-12) for x in (inputs, louder)
    )
    np.testing.assert_allclose(one, other, atol=1e-8)
    assert not np.allclose(one, run("core_regmean", models, core_gram=roots_of(louder), balance=0.0), atol=1e-3)


def test_directions_that_were_not_measured_are_added_up() -> None:
    models, inputs = drawn(11, 3)
    merged = run("core_regmean", models, core_gram=roots_of(inputs * np.array([1, 1, 1, 0, 0, 0])))
    np.testing.assert_allclose(merged[:, 3:], models.sum(axis=0)[:, 3:], atol=1e-12)
    assert not np.allclose(merged[:, :3], models.mean(axis=0)[:, :3], atol=1e-3)
    np.testing.assert_allclose(run("core_regmean", models, core_gram=np.zeros((3, 2, 6))), models.sum(axis=0))


def test_a_turned_matrix_is_merged_by_its_rows() -> None:
    models, inputs = drawn(8, 2)
    turned = run("regmean", models.transpose(0, 2, 1), gram=grams_of(inputs), inputs="rows")
    np.testing.assert_allclose(turned.T, run("regmean", models, gram=grams_of(inputs)), atol=1e-12)


def test_moments_that_rounding_made_indefinite_still_merge() -> None:
    """Float32 moments of few tokens with one huge direction: the ridge is below their rounding."""
    models, _ = drawn(9, 2, width=40)
    inputs = np.random.default_rng(9).standard_normal((2, 10, 40)) + 1e3 * np.ones(40)
    grams = grams_of(inputs).astype(np.float32).astype(np.float64)
    merged = run("regmean", models, gram=grams, alpha=1.0, ridge=1e-12)
    assert np.isfinite(merged).all() and np.abs(merged).max() < 100 * np.abs(models).max()


def test_what_is_measured_must_be_given() -> None:
    with pytest.raises(RecipeError, match=r"fisher reads what is measured with examples: give fisher=\[models, ...\]"):
        methods.get("fisher").run(models=torch.zeros(2, 3))
