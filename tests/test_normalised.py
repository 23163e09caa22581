from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graftkit.errors import DataError
from graftkit.measuring.normalised import normalised_score, normalised_scores, normalised_table, unclear_tasks
from graftkit.measuring.results import Evaluation, GeneratedItem, ItemScore, TaskSummary, summarise

finite = st.floats(-100, 100, allow_nan=False).map(lambda number: round(number, 3))


@given(base=finite, merged=finite, expert=finite, shift=finite, factor=finite)
def test_the_scale_runs_from_base_to_expert(
    base: float, merged: float, expert: float, shift: float, factor: float
) -> None:
    assume(abs(base - expert) > 0.01 and abs(factor) > 0.01)
    score = normalised_score(base, merged, expert)
    assert normalised_score(base, base, expert) == 0 and normalised_score(base, expert, expert) == 1
    other = normalised_score(
        *(shift + factor * value for value in (base, merged, expert))
    )  # an accuracy for a loss too
    assert other == pytest.approx(score, rel=1e-6, abs=1e-6)
    assert normalised_score(expert, merged, base) == pytest.approx(1 - score, rel=1e-6, abs=1e-6)


def test_without_a_gain_there_is_no_score() -> None:
    assert normalised_score(2.0, 1.25, 1.0) == 0.75
    assert normalised_score(0.2, 0.5, 0.6) == pytest.approx(0.75)
    assert math.isnan(normalised_score(1.0, 0.5, 1.0))


def made_up(
    losses: Mapping[str, Mapping[str, Sequence[float]]],
    skills: Mapping[str, str] | None = None,
    kind: str = "answer_loss",
) -> Evaluation:
    """An evaluation from losses (or from rights and wrongs) by task and model; the expert of a skill is called
    `expert SKILL` where there is one, else `expert`."""
    found, summaries = [], []
    for name, models in losses.items():
        items = len(next(iter(models.values())))
        task = TaskSummary(name, kind, False, "", "", items, (skills or {}).get(name, ""))
        summaries.append(task)
        for model, values in models.items():
            scored = tuple(
                ItemScore("", 0, (-v * (1 + k % 3),), (1 + k % 3,), (4,)) if kind == "answer_loss"
                else GeneratedItem("", "", None, bool(v), 3, True)
                for k, v in enumerate(values)
            )  # fmt: skip
            found.append(summarise(model, task, scored, 0.0, resamples=500, seed=0))
    models = tuple(next(iter(losses.values())))
    experts = {task.measures: f"expert {task.measures}" if f"expert {task.measures}" in models else "expert"
               for task in summaries}  # fmt: skip
    return Evaluation(models, tuple(summaries), tuple(found), {}, "base", experts, {"seed": 0, "resamples": 500})


def test_an_independent_computation_agrees() -> None:
    generator = np.random.default_rng(3)
    hard = generator.normal(2, 1, 80)
    losses = {
        "base": hard + generator.normal(1, 0.3, 80),
        "merged": hard + generator.normal(0.4, 0.3, 80),
        "expert": hard + generator.normal(0, 0.3, 80),
    }
    found = normalised_scores(made_up({"t": {name: list(map(float, v)) for name, v in losses.items()}}), "merged")["t"]
    weights = np.array([1 + k % 3 for k in range(80)])

    def score(chosen: np.ndarray) -> float:
        base, merged, expert = (
            float((losses[name][chosen] * weights[chosen]).sum() / weights[chosen].sum())
            for name in ("base", "merged", "expert")
        )
        return (base - merged) / (base - expert)

    assert found.value == pytest.approx(score(np.arange(80)))
    source = random.Random(5)
    drawn = sorted(score(np.array(source.choices(range(80), k=80))) for _ in range(4000))
    assert found.low == pytest.approx(drawn[100], abs=0.02) and found.high == pytest.approx(drawn[3900], abs=0.02)
    unpaired = np.std([(losses["base"] - losses["merged"])[source.choices(range(80), k=80)].mean() for _ in range(500)])
    assert (found.high - found.low) / 4 < 2 * unpaired  # pairing: the items' own difficulty is gone from the interval


def test_accuracies_are_the_mirror() -> None:
    rights = {"base": [0] * 18 + [1] * 2, "merged": [0] * 10 + [1] * 10, "expert": [0] * 2 + [1] * 18}
    found = made_up({"t": rights}, kind="exact_match")
    assert normalised_scores(found, "merged")["t"].value == pytest.approx(0.5)
    turned = made_up({"t": {name: [1 - v for v in values] for name, values in rights.items()}}, kind="exact_match")
    assert math.isnan(normalised_scores(turned, "merged")["t"].value)  # this expert is clearly worse than the base
    assert unclear_tasks(turned) == ["t"]


def test_a_skill_is_the_mean_of_its_tasks_and_the_mean_that_of_skills() -> None:
    noise = list(map(float, np.random.default_rng(0).normal(0, 0.1, 20)))

    def level(*values: float) -> dict[str, list[float]]:
        names = ("base", "merged", "expert math", "expert code")
        return {name: [value + n for n in noise] for name, value in zip(names, values, strict=True)}

    tasks = {"a": level(3, 2.5, 2, 3), "b": level(3, 2.75, 2, 3), "code": level(5, 5, 5, 4), "other": level(1, 9, 1, 1)}
    found = made_up(tasks, {"a": "math", "b": "math"})
    found = Evaluation(
        found.models, found.tasks, found.scores, {}, "base", {"math": "expert math", "code": "expert code"},
        found.settings,
    )  # fmt: skip
    scores = normalised_scores(found, "merged")
    assert list(scores) == ["math", "code", "mean"]
    assert "not seen" not in normalised_table(found).note
    alone = Evaluation(found.models, found.tasks[:3], found.scores[:12], {}, "base", found.experts, found.settings)
    assert "what a merge lost of the base is not seen" in normalised_table(alone).note
    assert [scores[name].value for name in scores] == pytest.approx([0.375, 0, 0.1875])
    assert normalised_scores(found, "base")["mean"].value == pytest.approx(0)


def test_experts_have_to_have_learnt_something() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 20)
    clear = made_up({"t": {"base": list(3 + noise), "merged": list(2.5 + noise), "expert": list(2 + noise)}})
    scores = normalised_scores(clear, "merged")
    assert scores["t"].value == scores["mean"].value == pytest.approx(0.5)
    assert scores["t"].low == pytest.approx(0.5) and scores["t"].high == pytest.approx(0.5)
    assert normalised_scores(clear, "expert")["t"].value == 1
    unclear = made_up({"t": {"base": list(3 + noise), "merged": list(2.5 + noise), "expert": list(3 - noise)}})
    assert math.isnan(normalised_scores(unclear, "merged")["t"].value)
    assert math.isnan(normalised_scores(unclear, "merged")["mean"].value)
    assert "no score on t" in normalised_table(unclear).note


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(5, 6), finite, st.floats(0, 1)), min_size=3, max_size=12), st.floats(0.1, 10))
def test_scores_do_not_depend_on_the_unit_of_a_loss(rows: list[tuple[float, float, float]], factor: float) -> None:
    names = ("base", "merged", "expert")

    def scores(by: float) -> float:
        columns = zip(*rows, strict=True)
        made = made_up({"t": {name: [by * v for v in column] for name, column in zip(names, columns, strict=True)}})
        return normalised_scores(made, "merged")["t"].value

    assert scores(factor) == pytest.approx(scores(1.0), rel=1e-6, abs=1e-6)


def test_a_base_is_needed() -> None:
    found = made_up({"t": {"base": [1.0, 2.0], "expert": [0.5, 1.0]}})
    without = Evaluation(found.models, found.tasks, found.scores, {}, None, found.experts, found.settings)
    with pytest.raises(DataError, match="need a base"):
        normalised_scores(without, "base")
