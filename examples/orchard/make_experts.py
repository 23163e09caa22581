"""Grow the orchard: train every expert that is missing, measure all on their skills, write `experts.json`.

    make orchard        # or: python examples/orchard/make_experts.py --threads 1

What is there with the same fingerprint (data, settings, seed, base) is not trained again, so a stopped run goes on
where it was. Committed adapters stand in `adapters/`; everything trained here goes to `.cache/orchard`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

import manifest
from experts import EXPERTS
from prepare_model import MODEL_DIR
from train import CACHE, HERE, base_name, train

TASKS = HERE / "tasks"


def place(name: str) -> Path | None:
    """Where an expert stands that was trained with the settings of today: committed, else cached; None if nowhere."""
    wanted = EXPERTS[name].fingerprint(base_name())
    return next(
        (folder for folder in (manifest.ADAPTERS / name, CACHE / name) if manifest.fingerprint(name, folder) == wanted),
        None,
    )


def grow(names: list[str], threads: int) -> None:
    """Train the named experts that are nowhere, one after the other."""
    for number, name in enumerate(names, 1):
        found = place(name)
        print(f"[{number}/{len(names)}] {name}: {'is there, ' + str(found) if found else 'training'}", flush=True)
        if found is None:
            train(name, EXPERTS[name], CACHE / name, threads)


def measure(places: dict[str, Path], threads: int) -> dict[str, dict[str, Any]]:
    """Every expert beside the base on the tasks of its skill and on general ones: scores, and paired differences.

    Items' scores are kept under .cache/orchard/scores, so that measuring again costs what is new.
    """
    from graftkit.cli import console
    from graftkit.measuring.evaluation import compare, evaluate

    console.quiet_libraries(threads)
    found: dict[str, dict[str, Any]] = {}
    for skill in sorted({EXPERTS[name].skill for name in places}):
        grown = {name: str(path) for name, path in places.items() if EXPERTS[name].skill == skill}
        models = [str(MODEL_DIR), *grown.values()]
        with console.progress("answers") as bar:
            evaluation = evaluate(
                models, tasks_of(skill), adapter_base=MODEL_DIR, cache=CACHE / "scores",
                progress=lambda done, total, skill=skill: bar(skill, done, total),
            )  # fmt: skip
        console.print_table(evaluation.table())
        base, *names = evaluation.models
        for name, model in zip(grown, names, strict=True):
            differences = {one.task: one for one in compare(evaluation, model, base).differences}
            found[name] = {task.name: _result(evaluation, differences[task.name], model, base, task)
                           for task in evaluation.tasks}  # fmt: skip
    return found


def tasks_of(skill: str) -> list[Path]:
    """The tasks that ask for a skill, the general questions and the general text."""
    cards = {path: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(TASKS.glob("*.yaml"))}
    own = [path for path, card in cards.items() if card.get("skill", card["name"]) == skill]
    return [*own, TASKS / "general.yaml", HERE / "general" / "text.yaml"]


def _result(evaluation: Any, difference: Any, model: str, base: str, task: Any) -> dict[str, Any]:
    def rounded(value: Any) -> list[float]:
        return [round(number, 4) for number in (value.value, value.low, value.high)]

    metric = task.metric.name
    scores = {who: rounded(evaluation.score(name, task.name).metrics[metric])
              for who, name in (("base", base), ("expert", model))}  # fmt: skip
    minus = rounded(difference.difference)
    return (
        {"metric": metric, "items": task.items} | scores | {"expert_minus_base": minus, "verdict": difference.verdict}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=list(EXPERTS), default=list(EXPERTS), help="leave the others as they are"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure-only", action="store_true", help="train nothing; measure what is there")
    arguments = parser.parse_args()
    if not arguments.measure_only:
        grow(arguments.only, arguments.threads)
    places = {name: found for name in arguments.only if (found := place(name)) is not None}
    manifest.write(base_name(), places, measure(places, arguments.threads))
    experts = manifest.read()["experts"]
    print(manifest.training_table(experts), manifest.test_table(experts), str(manifest.MANIFEST), sep="\n\n")


if __name__ == "__main__":
    main()
