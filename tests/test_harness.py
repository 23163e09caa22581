"""lm-eval's tasks, through its own program, on a tiny model: local data, no network. Needs the extra `eval`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import talker
from graftkit.data import Item, Task
from graftkit.errors import DataError, GraftError
from graftkit.measuring.comparison import compare
from graftkit.measuring.evaluation import Evaluation, evaluate

ROWS = [
    {"q": "two and two make", "choices": ["four", "five and a mat"], "gold": 0},
    {"q": "Berlin is", "choices": ["two", "a city"], "gold": 1},
    {"q": "the cat sat on the", "choices": ["mat", "city", "four"], "gold": 0},
    {"q": "what is the capital of France?", "choices": ["Paris", "cat"], "gold": 0},
]
COMMON = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
CHOICE = """output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
REPLIES = """output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval and what it stands on warn of their own affairs


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval", reason="needs the extra eval: pip install 'graftkit[eval]'")
    root = tmp_path_factory.mktemp("tasks")
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = COMMON.format(data=root / "data.jsonl")
    tasks = {"quiz": CHOICE, "second_quiz": CHOICE + "num_fewshot: 0\n", "texts": ROLLING, "replies": REPLIES}
    for name, text in tasks.items():
        (root / f"{name}.yaml").write_text(f"task: {name}\n{common}{text}")
    (root / "all.yaml").write_text("group: quizzes\ntask: [quiz, second_quiz]\n")
    (root / "mixed.yaml").write_text("group: mixed\ntask: [quiz, texts]\n")
    return root


@pytest.fixture(scope="module")
def found(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    from graftkit.measuring.harness import load_harness

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        harness = load_harness(["quiz", "texts", "replies"], directory)
        models = [("a", talker.tiny(0), talker.tokenizer()), ("b", talker.tiny(1), talker.tokenizer())]
        own = Task("own", "answer_loss", (Item("Berlin is", (" a city",)), Item("two and", (" two",))))
        return evaluate(models, [own], harness=harness, base="a", experts={"quiz": "b"}, resamples=200)


def log_prob(model: Any, text: str, answer: str) -> float:
    task = Task("t", "answer_loss", ())
    return talker.slow(model, talker.tokenizer(), task, Item(text, (answer,)), answer)[0]


def test_scores_equal_a_slow_computation(found: Evaluation) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        model, right, by_byte = talker.tiny(seed), [], []
        for row in ROWS:
            values = np.array([log_prob(model, str(row["q"]), f" {choice}") for choice in row["choices"]])  # type: ignore[attr-defined]
            right.append(float(values.argmax() == row["gold"]))
            lengths = [len(choice) for choice in row["choices"]]  # type: ignore[attr-defined]
            by_byte.append(float((values / lengths).argmax() == row["gold"]))
        score = found.score(name, "quiz")
        assert [item.parts("acc")[0] for item in score.items] == right
        assert [item.parts("acc_norm")[0] for item in score.items] == by_byte
        assert score.metrics["acc"].value == pytest.approx(np.mean(right))
        texts = [str(row["q"]) for row in ROWS]
        bits = -sum(log_prob(model, "", text) for text in texts) / math.log(2) / sum(map(len, texts))
        assert found.score(name, "texts").metrics["bits_per_byte"].value == pytest.approx(bits, rel=1e-4)


def test_they_are_in_the_same_table(found: Evaluation) -> None:
    heads = [column.heading for column in found.table().columns]
    assert heads == ["model", "own (nats/token) ↓", "quiz (acc) ↑", "texts (bits/byte) ↓", "replies (exact_match) ↑"]
    assert "word_perplexity" not in found.score("a", "texts").metrics  # no ratio of sums over items
    assert [d.task for d in compare(found, "b", "a").differences] == ["own", "quiz", "texts", "replies"]
    assert found.versions["lm_eval"]
    assert Evaluation.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_a_groups_tasks_are_subtasks(directory: Path, found: Evaluation) -> None:
    from graftkit.measuring.harness import load_harness

    models = [("a", talker.tiny(0), talker.tokenizer())]
    group = evaluate(models, [], harness=load_harness(["quizzes"], directory), resamples=50).score("a", "quizzes")
    assert set(group.subtasks) == {"quiz", "second_quiz"} and len(group.items) == 8
    assert group.metrics["acc"].value == found.score("a", "quiz").metrics["acc"].value
    with pytest.raises(DataError, match="mixed: none of its metrics"):
        evaluate(models, [], harness=load_harness(["mixed"], directory))
    limited = evaluate(models, [], harness=load_harness(["quiz"], directory, limit=2), resamples=50)
    assert len(limited.score("a", "quiz").items) == 2


def test_what_cannot_be_had_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    from graftkit.measuring.harness import load_harness

    (directory / "absent.yaml").write_text("task: absent\ndataset_path: nobody/nothing\ntest_split: test\n" + CHOICE)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(DataError, match="task absent: what it needs cannot be had"):
        load_harness(["absent"], directory)
    own = TaskManager(include_path=str(directory), include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: own)  # its own index takes most of a minute
    with pytest.raises(DataError, match="unknown task 'quizz'; did you mean 'quiz'"):
        load_harness(["quizz"], directory)


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from graftkit.measuring.harness import load_harness

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(GraftError, match=r"pip install 'graftkit\[eval\]'"):
        load_harness(["quiz"])
