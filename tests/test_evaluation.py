from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftkit.data import Item, Task
from graftkit.errors import CheckpointError, DataError, GraftError, NonFiniteError
from graftkit.measuring.evaluation import Evaluation, compare, evaluate
from graftkit.measuring.loading import opened
from graftkit.measuring.resampling import ratio_estimates
from talker import slow, tiny, tokenizer

LOSS = Task(
    "loss",
    "answer_loss",
    (
        Item("what is the capital of France?", (" Paris",), 0, "places"),
        Item("two and two make", (" four and not five, or so they say",), 0, "sums"),
        Item("", ("the cat sat on the mat",), 0, "places"),
        Item("the cat sat on the mat and " * 4, (" the mat",), 0, "sums"),
    ),
)
CHOICE = Task(
    "choice",
    "multiple_choice",
    (
        Item("the cat sat on the", (" mat", " city of Berlin", " four"), 0),
        Item("Berlin is", (" two", " a city"), 1),
        Item("two and two make " * 3, (" a cat and a mat", " four", " five", " a"), 1),
    ),
)


@pytest.fixture(scope="module", name="tokenizer")
def _tokenizer() -> Any:
    return tokenizer()


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("task", [LOSS, CHOICE], ids=["loss", "choice"])
def test_scores_equal_a_slow_computation(tokenizer: Any, task: Task, chat: bool) -> None:
    model, task = tiny(), replace(task, chat=chat)
    found = evaluate([("tiny", model, tokenizer)], [task], resamples=10).score("tiny", task.name)
    for item, score in zip(task.items, found.items, strict=True):
        wanted = [slow(model, tokenizer, task, item, choice) for choice in item.choices]
        assert score.log_probs == pytest.approx([value for value, _ in wanted], abs=1e-4)
        assert list(score.tokens) == [tokens for _, tokens in wanted]
    if task.kind == "answer_loss":
        values = [slow(model, tokenizer, task, item, item.choices[0]) for item in task.items]
        loss = -sum(value for value, _ in values) / sum(tokens for _, tokens in values)
        assert found.metrics["loss"].value == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("task", [LOSS, CHOICE], ids=["loss", "choice"])
def test_batching_changes_nothing(tokenizer: Any, task: Task) -> None:
    scores = [
        evaluate([("tiny", tiny(), tokenizer)], [task], batch_tokens=tokens, resamples=10).score("tiny", task.name)
        for tokens in (1, 60, 10_000)
    ]
    for one in scores[1:]:
        for item, other in zip(scores[0].items, one.items, strict=True):
            assert item.log_probs == pytest.approx(other.log_probs, abs=1e-5)


def test_savings_are_used_where_they_hold_and_only_there(tokenizer: Any) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from graftkit.measuring.encoding import encode
    from graftkit.measuring.scoring import choose_scorer

    rows = encode(tokenizer, CHOICE)
    scorer = choose_scorer(tiny(), rows)
    assert scorer.head_only and scorer.shared
    capped = Gemma2Config(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5, sliding_window=8,
    )  # fmt: skip
    model = Gemma2ForCausalLM(capped).eval()
    assert not choose_scorer(model, rows).head_only
    assert not choose_scorer(model, rows).shared  # its window of 8 tokens does not survive a mask of ours
    found = evaluate([("capped", model, tokenizer)], [CHOICE], resamples=10).score("capped", "choice")
    for item, score in zip(CHOICE.items, found.items, strict=True):
        wanted = [slow(model, tokenizer, CHOICE, item, choice)[0] for choice in item.choices]
        assert score.log_probs == pytest.approx(wanted, abs=1e-4)


def test_multiple_choice_picks_by_byte_and_by_sum(tokenizer: Any) -> None:
    model = tiny()
    found = evaluate([("tiny", model, tokenizer)], [CHOICE], resamples=10).score("tiny", "choice")
    by_byte = by_sum = 0
    for item in CHOICE.items:
        values = np.array([slow(model, tokenizer, CHOICE, item, choice)[0] for choice in item.choices])
        by_sum += int(values.argmax() == item.answer)
        by_byte += int((values / [len(choice) for choice in item.choices]).argmax() == item.answer)
    assert found.metrics["accuracy"].value == pytest.approx(by_byte / 3)
    assert found.metrics["accuracy_by_sum"].value == pytest.approx(by_sum / 3)


def test_an_evaluation_is_repeatable_and_goes_through_json(tokenizer: Any) -> None:
    models = [("a", tiny(0), tokenizer), ("b", tiny(1), tokenizer)]
    calls: list[tuple[int, int]] = []

    def run(seed: int) -> Evaluation:
        calls.clear()
        return evaluate(
            models, [LOSS, CHOICE], base="a", experts={"loss": "b"}, seed=seed, resamples=200,
            progress=lambda done, total: calls.append((done, total)),
        )  # fmt: skip

    first, again, other = run(0), run(0), run(1)
    intervals = [[score.metrics for score in evaluation.scores] for evaluation in (first, again, other)]
    assert intervals[0] == intervals[1] != intervals[2]
    assert calls[-1] == (calls[-1][1],) * 2 and calls == sorted(calls)
    read = Evaluation.from_dict(json.loads(json.dumps(first.to_dict(), allow_nan=False)))
    assert read == first
    assert set(first.score("a", "loss").subtasks) == {"places", "sums"}
    assert [row[0] for row in first.table("loss").rows] == ["all", "places", "sums"]
    assert [column.name for column in first.table("loss").columns] == ["subtask", "a", "b"]
    assert len(first.table().rows) == 2
    with pytest.raises(DataError, match="did you mean 'choice'"):
        first.table("choise")


def test_a_live_model_keeps_its_mode(tokenizer: Any) -> None:
    model = tiny().train()
    evaluate([("tiny", model, tokenizer)], [LOSS], resamples=10)
    assert model.training


@pytest.mark.parametrize("device", ["quantum", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(tmp_path: Path, device: str) -> None:
    with (
        pytest.raises(GraftError, match=f"--device {device}: not available here"),
        opened(tmp_path, device=device, dtype="float32"),
    ):
        pass


def test_a_truncated_model_and_one_without_tokenizer_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with (
        pytest.raises(CheckpointError, match="no tokenizer that transformers reads; copy that of its base there"),
        opened(tmp_path, device="cpu", dtype="float32"),
    ):
        pass
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="deserializing"), opened(tmp_path, device="cpu", dtype="float32"):
        pass


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21 under transformers 5.23
def test_a_directory_and_an_adapter_load(tokenizer: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = tiny()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(tiny(), config)
    adapted.save_pretrained(tmp_path / "adapter")
    found = evaluate(
        [tmp_path / "base", str(tmp_path / "adapter"), ("live", adapted, tokenizer)],
        [LOSS, CHOICE],
        adapter_base=tmp_path / "base",
        device="cpu",
        resamples=10,
    )
    assert found.models == ("base", "adapter", "live")
    for task in ("loss", "choice"):
        saved, live = found.score("adapter", task).items, found.score("live", task).items
        for one, other in zip(saved, live, strict=True):
            assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)
    assert found.score("base", "loss").metrics["loss"].value != found.score("adapter", "loss").metrics["loss"].value


def test_what_cannot_be_evaluated_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    import torch

    with pytest.raises(CheckpointError, match="no such directory"):
        evaluate([tmp_path / "absent"], [LOSS])
    with pytest.raises(DataError, match="two models are called 'a'"):
        evaluate([("a", tiny(), tokenizer)] * 2, [LOSS])
    with pytest.raises(DataError, match="two tasks are called 'loss'"):
        evaluate([("a", tiny(), tokenizer)], [LOSS, LOSS])
    with pytest.raises(DataError, match=r"base: unknown model 'basis'; did you mean 'base'\?"):
        evaluate([("base", tiny(), tokenizer)], [LOSS], base="basis")
    with pytest.raises(DataError, match="experts: unknown skill 'los'; did you mean 'loss'"):
        evaluate([("base", tiny(), tokenizer)], [LOSS], experts={"los": "base"})
    with pytest.raises(DataError, match=r"loss, item 1: .* tokens, but the model takes 8"):
        evaluate([("a", tiny(max_position_embeddings=8), tokenizer)], [LOSS])
    broken = tiny()
    broken.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="task loss"):
        evaluate([("broken", broken, tokenizer)], [LOSS])


def test_names_are_as_long_as_they_need_be() -> None:
    from graftkit.measuring.loading import model_names

    assert model_names(["runs/a/merged", "runs/b/merged", "base"]) == ("a/merged", "b/merged", "base")
    assert model_names(["merged", "runs/merged"]) == ("merged", "runs/merged")


def test_bootstrap_intervals_cover_and_repeat() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        parts = np.stack([generator.normal(2.0, 1.0, 50), np.ones(50)], axis=1)[:, None]
        value = ratio_estimates(parts, 400, trial, "t")[0]
        assert value.low is not None and value.high is not None and value.low < value.value < value.high
        hits += value.low <= 2.0 <= value.high
    assert 178 <= hits <= 200  # 95% of 200, within four standard errors
    assert ratio_estimates(parts, 400, 7, "t") == ratio_estimates(parts, 400, 7, "t")
    assert ratio_estimates(parts, 400, 7, "t") != ratio_estimates(parts, 400, 7, "u")


def test_bootstrap_weights_items_by_their_tokens() -> None:
    parts = np.array([[[1.0, 1.0]], [[9.0, 3.0]]])
    value = ratio_estimates(parts, 500, 0, "t")[0]
    assert (value.value, value.low, value.high) == (2.5, 1.0, 3.0)


def test_bootstrap_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import graftkit.measuring.resampling as resampling

    parts = np.random.default_rng(0).normal(size=(30, 2))
    whole = resampling.resampled_sums(parts, 100, 0, "t")
    monkeypatch.setattr(resampling, "_BLOCK", 90)
    assert np.array_equal(whole, resampling.resampled_sums(parts, 100, 0, "t"))


def test_comparisons_are_paired(tokenizer: Any) -> None:
    model, other = tiny(), tiny()
    other.model.embed_tokens.weight.data[:100].add_(0.5)
    models = [("base", model, tokenizer), ("same", tiny(), tokenizer), ("other", other, tokenizer)]
    found = evaluate(models, [LOSS], base="base", experts={"loss": "other"}, resamples=500)
    equal = compare(found, "same", "base").differences[0]
    assert (equal.difference.value, equal.difference.low, equal.difference.high) == (0, 0, 0)
    assert equal.verdict == "unclear"
    there, back = compare(found, "base", "other").differences[0], compare(found, "other", "base").differences[0]
    assert there.difference.value == pytest.approx(-back.difference.value)
    assert there.difference.low == pytest.approx(-(back.difference.high or 0))
    assert "minus" in compare(found, "base", "other").table().title
