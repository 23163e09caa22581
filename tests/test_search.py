"""Searches: spaces, optimisers against chance, studies that are killed, and the whole on a tiny model."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

import talker
import tiny
from graftkit.errors import DataError, GraftError, NonFiniteError, OutputError, RecipeError
from graftkit.improving import optimisers
from graftkit.improving.optimisers import OPTIMISERS, Asked
from graftkit.improving.search import search
from graftkit.improving.search_objective import Objective, Trial, _completed
from graftkit.improving.search_space import Axis, Space, space_of
from graftkit.improving.search_study import Settings, Study
from graftkit.recipes.recipe import load

RECIPE = {"method": "task_arithmetic", "base": "b", "models": [{"model": "x", "weight": 0.3}, {"model": "y"}]}
LOCAL = ("cma", "pattern", "powell")


def plane(count=2):
    """A space without a merge behind it."""
    return Space(load(RECIPE), tuple(Axis(f"a{k}", f"a{k}") for k in range(count)))


def quadratic(values, centre):
    return 1 - sum((v - c) ** 2 for v, c in zip(values, centre, strict=True))


def tried(name, score, space, budget, seed):
    record = {}
    for number in range(budget):
        asked = Asked(space, dict(record), number, seed, budget)
        values = optimisers.ask(name, asked)
        assert all(axis.low <= v <= axis.high for axis, v in zip(space.axes, values, strict=True))
        record[values] = score(values)
    return record


@pytest.mark.parametrize("name", [name for name in OPTIMISERS if name not in ("random", "grid", "gp")])
def test_an_optimiser_beats_chance_on_a_quadratic(name):
    rng = np.random.default_rng(7)
    centres = rng.uniform(0.2, 0.8, (20, 2))
    space, regrets = plane(), {"random": [], name: []}
    for who, found in regrets.items():
        for seed, centre in enumerate(centres):
            found.append(1 - max(tried(who, lambda v, centre=centre: quadratic(v, centre), space, 36, seed).values()))
    assert np.mean(regrets[name]) < (1.0 if name == "sobol" else 0.5) * np.mean(regrets["random"])


def test_a_grid_has_all_combinations_that_the_budget_holds():
    found = tried("grid", lambda v: 0.0, plane(), 40, 0)
    levels = [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert list(found)[:36] == [(a, b) for a in levels for b in levels] and len(found) == 40


def test_the_gaussian_process_beats_chance_by_far():
    centre, space = (0.31, 0.64), plane()
    best = [1 - max(tried("gp", lambda v: quadratic(v, centre), space, 14, seed).values()) for seed in (0, 1)]
    chance = [1 - max(tried("random", lambda v: quadratic(v, centre), space, 14, seed).values()) for seed in range(20)]
    assert np.mean(best) < 0.1 * np.mean(chance)


@pytest.mark.parametrize("name", [name for name in OPTIMISERS if name != "gp"])
def test_what_is_asked_follows_from_record_seed_and_number(name):
    def points(seed):
        return list(tried(name, lambda v: quadratic(v, (0.4, 0.5, 0.6)), plane(3), 30, seed))

    assert points(3) == points(3) and (name == "grid" or points(3) != points(4))


@pytest.mark.parametrize("name", LOCAL)
def test_local_optimisers_start_anew_where_they_converge(name):
    """Two hills: the lower one is where some runs end, yet all find the higher one in the end."""

    def hills(values):
        x, y = values
        return max(0.6 - (x - 0.2) ** 2 - (y - 0.2) ** 2, 1 - 8 * ((x - 0.85) ** 2 + (y - 0.85) ** 2))

    best = [max(tried(name, hills, plane(), 90, seed).values()) for seed in range(3)]
    assert np.median(best) > 0.9


@pytest.mark.parametrize("name", [name for name in OPTIMISERS if name not in ("gp", "grid")])
def test_several_workers_do_not_wait_for_each_other(name):
    space, record = plane(), {}
    for number in range(8):
        record[optimisers.ask(name, Asked(space, dict(record), number, 1))] = 0.1 * number
    first = optimisers.ask(name, Asked(space, record, 8, 1))
    second = optimisers.ask(name, Asked(space, record, 9, 1, pending=frozenset([first])))
    assert first != second


def test_a_space_of_few_choices_does_not_hang():
    space = Space(load(RECIPE), (Axis("c", "c", values=("one", "two")), Axis("n", "n", 1, 3, whole=True)))
    for name in ("pattern", "powell", "cma"):
        asked = [optimisers.ask(name, Asked(space, {("one", n): 0.0 for n in (1, 2, 3)}, k, 0)) for k in (3, 4)]
        assert all(values[0] in ("one", "two") and values[1] in (1, 2, 3) for values in asked)


def test_unknown_and_unfit_optimisers_are_refused():
    with pytest.raises(GraftError, match="did you mean 'powell'"):
        optimisers.check("powel")
    with pytest.raises(GraftError, match="takes one objective, got 2"):
        optimisers.check("cma", ("math", "code"))


def test_the_space_without_a_section():
    assert [axis.name for axis in space_of(load(RECIPE)).axes] == ["weight 0", "weight 1"]
    ties = space_of(load(RECIPE | {"method": "ties", "prepare": [{"dare": {"density": 0.5}}]}))
    assert [axis.name for axis in ties.axes] == ["weight 0", "weight 1", "density", "dare.density"]
    made = ties.recipe_of((0.25, 0.75, 0.1, 0.9))
    assert made.knobs == {"weight": [0.25, 0.75], "density": 0.1}
    assert made.prepare == [{"dare": {"density": 0.9}}] and made.models[0].knobs == {}
    assert ties.recipe_of((0.0, 0.75, 0.0, 0.9)).knobs == {"weight": [1e-9, 0.75], "density": 0.0}


def test_a_section_narrows_fixes_ties_and_groups():
    section = {
        "weight": {"low": 0.1, "high": 1.5, "each": [[0, 1], [2]], "gradient": 2},
        "scale": 0.7,
        "normalize": {},
    }
    models = ["x", "y", "z"]
    space = space_of(load(RECIPE | {"models": models, "search": section}))
    assert [axis.name for axis in space.axes] == [
        "weight 0+1 point 0", "weight 0+1 point 1", "weight 2 point 0", "weight 2 point 1", "normalize"
    ]  # fmt: skip
    made = space.recipe_of((0.1, 0.2, 0.3, 0.4, True))
    both = {"gradient": [0.1, 0.2]}
    assert made.knobs == {"scale": 0.7, "weight": [both, both, {"gradient": [0.3, 0.4]}], "normalize": True}
    assert made.search is None and "search" not in made.to_yaml()


def test_a_merge_leaves_the_section_alone(tmp_path):
    from graftkit.recipes.plan import plan

    base, one, two = map(str, tiny.family(tmp_path))
    plain = {"method": "task_arithmetic", "base": base, "models": [one, two]}
    assert plan(plain | {"search": {"weight": {"low": 0, "high": 2}}}).hash == plan(plain).hash
    with pytest.raises(RecipeError, match="a mapping from knobs"):
        load(plain | {"search": 3})


def test_a_section_by_role_and_by_logarithm():
    section = {"weight": {"low": 0.01, "high": 1, "log": True, "each": "one", "roles": ["attention", "mlp"]}}
    space = space_of(load(RECIPE | {"search": section}))
    assert [axis.name for axis in space.axes] == ["weight attention", "weight mlp"]
    assert space.at([0.5, 1.0]) == (0.1, 1.0)
    rules = space.recipe_of((0.2, 0.3)).rules
    assert [(rule.where.role, rule.knobs) for rule in rules] == [
        ("attention", {"weight": 0.2}),
        ("mlp", {"weight": 0.3}),
    ]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"wieght": {}}, "did you mean 'weight'"),
        ({"weight": {"lo": 0}}, "did you mean 'low'"),
        ({"weight": {"low": 2, "high": 1}}, "expected low < high"),
        ({"weight": {"each": [[0]]}}, "groups with each model once"),
        ({"weight": {"roles": ["mpl"]}}, "did you mean 'mlp'"),
        ({"weight": {"gradient": 1}}, "2 to 16 points"),
        ({"svc.x": {}}, "part of this recipe"),
        ({"scale": {"low": 0, "high": math.inf}}, "high is missing"),
        ({"weight": {"low": math.nan}}, "low: got nan, expected a number"),
        ({"weight": {"values": []}}, "at least one value"),
        ({"weight": {"values": [0.5], "low": 0}}, "beside low, expected"),
    ],
)
def test_sections_that_cannot_be_meant(section, message):
    with pytest.raises(RecipeError, match=message):
        space_of(load(RECIPE | {"search": section}))


STUDY = """
import sys, time
sys.path[:0] = {path!r}
from pathlib import Path
from test_search import plane, quadratic
from graftkit.improving.search_objective import Trial
from graftkit.improving.search_study import Settings, Study

def run(recipe, best):
    time.sleep({pause})
    values = [recipe.knobs["a0"], recipe.knobs["a1"]]
    return Trial(quadratic(values, (0.4, 0.7)), {{}}, 0.0, 0.0)

study = Study(Path({out!r}), plane(), Settings({name!r}, {budget}, 5), {{"name": {name!r}}})
study.work(run)
"""


def started(out, name, budget, pause):
    code = STUDY.format(path=[str(Path(__file__).parent)], out=str(out), name=name, budget=budget, pause=pause)
    return subprocess.Popen([sys.executable, "-c", code])


def trials(out, name, budget):
    study = Study(out, plane(), Settings(name, budget, 5), {"name": name})
    return [(kept.number, kept.values, kept.score) for kept in study.finished()]


@pytest.mark.parametrize("name", ["pattern", "gp"])
def test_a_study_that_is_killed_ends_with_the_same_trials(tmp_path, name):
    budget = 11
    assert started(tmp_path / "whole", name, budget, 0).wait() == 0
    process, journal = started(tmp_path / "killed", name, budget, 0.15), tmp_path / "killed" / "study.journal"
    moment = np.random.default_rng(time.time_ns()).uniform(0.2, 1.0)
    while not (journal.is_file() and b'"worker"' in journal.read_bytes()):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = trials(tmp_path / "killed", name, budget)
    assert len(before) < budget
    assert started(tmp_path / "killed", name, budget, 0).wait() == 0
    assert trials(tmp_path / "killed", name, budget) == trials(tmp_path / "whole", name, budget)
    assert [number for number, *_ in trials(tmp_path / "killed", name, budget)] == list(range(budget))


@pytest.mark.parametrize("cut", [1, 0.9, 0.5, 0.2, 0.02])
def test_a_journal_that_is_cut_in_its_last_line_goes_on(tmp_path, cut):
    """By a full disk, or a kill within a write; a worker that lives goes on behind it too."""

    def study(name):
        return Study(tmp_path / name, plane(), Settings("random", 6, 5), {"name": "random"})

    def run(recipe, best):
        return Trial(quadratic((recipe.knobs["a0"], recipe.knobs["a1"]), (0.4, 0.7)), {}, 0, 0)

    def found(study):
        return [(kept.number, kept.values, kept.score) for kept in study.finished()]

    whole = study("whole")
    whole.work(run)
    text, journal = (tmp_path / "whole" / "study.journal").read_bytes(), tmp_path / "cut" / "study.journal"
    place = len(text) - 1 if cut == 1 else int(cut * len(text))
    place -= text[place - 1 : place] == b"\n"
    (tmp_path / "cut" / "workers").mkdir(parents=True)
    journal.write_bytes(text[:place])
    again = study("cut")
    with journal.open("ab") as file:
        file.write(b'{"op_code":5,"wor')
    again.work(run)
    assert found(again) == found(study("cut")) == found(whole) and len(found(whole)) == 6


def test_several_processes_on_one_study(tmp_path):
    both = [started(tmp_path, "random", 12, 0.05) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert [number for number, *_ in trials(tmp_path, "random", 12)] == list(range(12))
    alone = tried("random", lambda v: 0.0, plane(), 12, 5)
    assert [values for _, values, _ in trials(tmp_path, "random", 12)] == list(alone)


def test_plain_optuna_opens_the_journal(tmp_path):
    """As `optuna-dashboard` does."""
    import optuna

    study = Study(tmp_path, plane(), Settings("sobol", 4, 0), {})
    study.work(lambda recipe, best: Trial(recipe.knobs["a0"], {"cats": 0.5}, 0, 0))
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.journal"))
    storage = optuna.storages.JournalStorage(backend)
    (name,) = optuna.get_all_study_names(storage)
    opened = optuna.load_study(study_name=name, storage=storage)
    assert [tuple(trial.params.values()) for trial in opened.trials] == [kept.values for kept in study.finished()]
    assert opened.best_value == study.best().score and opened.trials[0].user_attrs["tasks"] == {"cats": 0.5}


def test_another_search_in_the_same_place_is_refused(tmp_path):
    Study(tmp_path, plane(), Settings("random", 3, 5), {"name": "one"})
    with pytest.raises(OutputError, match="another name"):
        Study(tmp_path, plane(), Settings("random", 3, 5), {"name": "two"})


def test_what_is_no_search_is_left_alone(tmp_path):
    recipe, file = tmp_path / "recipe.yaml", tmp_path / "file"
    recipe.write_text("the user's")
    file.write_text("")
    for place, message in ((tmp_path, "holds no search"), (file, "cannot be written"), (file / "out", "cannot be")):
        with pytest.raises(OutputError, match=message):
            Study(place, plane(), Settings("random", 3, 5), {})
    assert sorted(tmp_path.iterdir()) == [file, recipe]


def test_a_merge_that_explodes_does_not_end_a_search(tmp_path):
    def run(recipe, best):
        if recipe.knobs["a0"] > 0.5:
            raise NonFiniteError("too large")
        return Trial(recipe.knobs["a0"], {}, 0, 0)

    for name in ("pattern", "gp"):
        study = Study(tmp_path / name, plane(), Settings(name, 14, 0), {})
        study.work(run)
        scores = [kept.score for kept in study.finished()]
        assert len(scores) == 14 and -math.inf in scores and 0 < study.best().score <= 0.5
        study.importances()


def test_the_front_and_the_best(tmp_path):
    study = Study(tmp_path, plane(), Settings("sobol", 6, 0, ("one", "other")), {})
    scores = iter([(0, 1), (1, 0), (0.6, 0.6), (0.5, 0.5), (0.2, 0.1), (0, 0)])
    study.work(lambda recipe, best: Trial(next(scores), {}, 0, 0))
    assert [kept.number for kept in study.front()] == [0, 1, 2] and study.best().number == 2


TEXTS = {
    "cats": [("the cat", " sat on the mat"), ("a mat", " and a cat"), ("on the", " mat sat"), ("the mat", " the cat")],
    "sums": [("two and two", " make four"), ("four and two", " make"), ("make two", " and four"), ("and", " make two")],
}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A tiny base, an expert for each of two tasks, and the tasks, on disk."""
    import torch

    root, tokenizer = tmp_path_factory.mktemp("family"), talker.tokenizer()
    for name in ("base", *TEXTS):
        model = talker.tiny()
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for prompt, answer in 3 * TEXTS.get(name, []):
            ids = torch.tensor([tokenizer(prompt + answer)["input_ids"]])
            model(ids, labels=ids).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for name, texts in TEXTS.items():
        lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in texts]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    models = [{"model": name, "weight": 1.0} for name in TEXTS]
    (root / "recipe.yaml").write_text(yaml.safe_dump({"method": "task_arithmetic", "base": "base", "models": models}))
    return root


def searched(family, out, **options):
    data = [family / f"{name}.jsonl" for name in TEXTS]
    return search(family / "recipe.yaml", data, out, optimizer="sobol", threads=1, **options)


def test_a_search_from_recipe_to_recipe(family, tmp_path):
    from graftkit.execution.live import Live

    out, test = tmp_path / "out", [str(family / "cats.jsonl"), str(family / "sums.jsonl")]
    found = searched(family, out, budget=6, test=test, start="metagpt")
    assert [kept.number for kept in found.trials] == list(range(6))
    assert found.score == max(kept.score for kept in found.trials)
    assert sum(found.trials[0].values) == pytest.approx(1)
    record = json.loads((out / "search.json").read_text())
    assert record["test"]["score"] == pytest.approx(found.score)  # the same items
    with Live.open(out / "recipe.yaml", workers=1) as live:
        objective = Objective(live, [])
        live.apply()
        assert objective.live.plan.recipe.knobs["weight"] == list(found.trials[record["best"]["trial"]].values)
    again = searched(family, out, budget=8, test=test, start="metagpt")
    assert again.trials[:6] == found.trials and len(again.trials) == 8
    with pytest.raises(OutputError, match="another seed"):
        searched(family, out, budget=8, start="metagpt", seed=1)


def test_gates_give_the_first_trial(family, tmp_path):
    from graftkit.checkpoints.gates import write_gates
    from graftkit.execution.live import Live
    from graftkit.recipes.gates import content

    with Live.open(family / "recipe.yaml", workers=1) as live:
        own = {Path(named.name).name: content(named) for named in live.plan.sources}
    values = {"m": np.array([[0.1, 0.3], [0.9, 0.3]], np.float32), "n": np.array([[0.5], [0.9]], np.float32)}
    kinds = {"free": ("cats", "sums", "coefficient"), "swapped": ("sums", "cats", "coefficient")}
    for name, (one, other, kind) in kinds.items():
        write_gates(
            tmp_path / f"{name}.safetensors", values, kind=kind, models=(own[one], own[other]), base=own["base"]
        )
    found = searched(family, tmp_path / "out", budget=2, start=str(tmp_path / "free.safetensors"))
    assert found.trials[0].values == pytest.approx((0.3, 0.7))
    with pytest.raises(RecipeError, match="in another order"):
        searched(family, tmp_path / "other", budget=2, start=str(tmp_path / "swapped.safetensors"))
    with pytest.raises(RecipeError, match="expected nan | metagpt | a file of gates"):
        searched(family, tmp_path / "other", budget=2, start="metagtp")


def test_scores_are_normalised_between_base_and_best_model(family, tmp_path):
    weights = {"weight": {"values": [1.0, 1e-9], "each": "model"}}
    recipe = load(family / "recipe.yaml").model_copy(update={"search": weights})
    found = search(recipe, [family / "cats.jsonl"], tmp_path / "out", optimizer="grid", budget=4, threads=1)
    scores = {kept.values: kept.score for kept in found.trials}
    assert scores[1.0, 1e-9] == pytest.approx(1, abs=1e-3) and scores[1e-9, 1e-9] == pytest.approx(0, abs=1e-3)
    assert found.score == max(scores.values())


def test_worst_each_and_raw(family, tmp_path):
    worst, each, raw = (searched(family, tmp_path / goal, budget=5, goal=goal) for goal in ("worst", "each", "raw"))
    assert worst.score == max(min(kept.score) for kept in each.trials)
    assert [kept.values for kept in worst.trials] == [kept.values for kept in each.trials]
    assert each.front and {kept.number for kept in each.front} == {
        int(path.stem) for path in (tmp_path / "each" / "front").iterdir()
    }
    assert raw.score < 0  # losses, signed


def test_a_weight_of_no_task_is_refused(family, tmp_path):
    with pytest.raises(RecipeError, match="--weight: .*did you mean 'cats'"):
        searched(family, tmp_path / "out", budget=2, weights={"cat": 2.0})
    assert not (tmp_path / "out").exists()


def test_several_workers_with_a_model_each(family, tmp_path):
    found = searched(family, tmp_path / "two", budget=5, goal="raw", workers=2)
    alone = searched(family, tmp_path / "one", budget=5, goal="raw")
    assert [(kept.number, kept.values) for kept in found.trials] == [(k.number, k.values) for k in alone.trials]
    assert found.score == pytest.approx(alone.score)


def test_a_task_that_no_model_is_better_at_is_refused(family, tmp_path):
    recipe = {"method": "task_arithmetic", "base": str(family / "cats"), "models": [{"model": str(family / "base")}]}
    with pytest.raises(DataError, match="no model of the recipe is better"):
        search(recipe, [family / "cats.jsonl"], tmp_path, threads=1, optimizer="random", budget=2)


class Stub:
    """A live model that scores items by a list instead of by a merge."""

    def __init__(self, items):
        self.items = items

    def apply(self, recipe):
        return None


def test_hopeless_trials_are_given_up_and_good_ones_are_not(monkeypatch):
    """Paired with the best on the same items; of trials as good as the best at most the allowed share is given up."""
    from graftkit.data import Item, Task

    task = Task("t", "answer_loss", tuple(Item(str(k), ("x",)) for k in range(80)))
    rng, wrong = np.random.default_rng(0), 0
    for round_number in range(200):
        base = rng.normal(-2, 1, 80)
        best = {"t": np.stack([base, np.ones(80)], axis=1)}
        gap = -0.5 if round_number == 0 else 0.0
        mine = base + gap + rng.normal(0, 0.2, 80)
        objective = Objective(Stub(mine), [task], goal="raw")
        monkeypatch.setattr(
            objective,
            "_measured",
            lambda tasks, mine=mine: {
                "t": np.stack([[mine[int(item.prompt)] for item in tasks[0].items], np.ones(len(tasks[0].items))], 1)
            },
        )
        made, parts = objective(None, best)
        if round_number == 0:
            assert made.share == 0.25 and made.score == pytest.approx(mine.mean(), abs=0.1)
            assert np.isnan(parts["t"]).any() and not np.isnan(_completed(parts, best)["t"]).any()
        else:
            wrong += made.share < 1
            assert made.share < 1 or made.score == pytest.approx(mine.mean())
    assert wrong / 199 < 0.09


def test_the_command(family, tmp_path):
    from typer.testing import CliRunner

    from graftkit.cli import app

    out = tmp_path / "out"
    data = [part for name in TEXTS for part in ("--data", str(family / f"{name}.jsonl"))]
    given = ["search", str(family / "recipe.yaml"), str(out), *data, "--budget", "6", "--optimizer", "sobol"]
    done = CliRunner().invoke(app, [*given, "--threads", "1"], catch_exceptions=False)
    assert done.exit_code == 0 and "best on dev" in done.output and "name a --test" in done.output
    assert {path.name for path in out.iterdir()} >= {"recipe.yaml", "search.json", "study.journal", "landscape.png"}
    told = CliRunner().invoke(app, [*given, "--threads", "1", "--json"], catch_exceptions=False)
    assert json.loads(told.output)["trials"] == 6
    assert CliRunner().invoke(app, [*given, "--goal", "meen"]).exception
