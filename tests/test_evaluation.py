from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftkit.data import Item, Task, load_task
from graftkit.errors import CheckpointError, DataError, NonFiniteError
from graftkit.measuring.evaluation import Evaluation, compare, evaluate, normalised_score, normalised_scores
from graftkit.measuring.resampling import ratio_estimates

SENTENCES = [
    "the cat sat on the mat",
    "two and two make four",
    "Berlin is a city",
    "what is the capital of France? Paris",
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
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


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(SENTENCES, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=special[0], eos_token=special[2], extra_special_tokens=[special[1]]
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def tiny(seed: int = 0, **changes: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 320, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = LlamaConfig(**(sizes | changes))
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)  # far from uniform, so that mistakes show
    return model


def slow(model: Any, tokenizer: Any, task: Task, item: Item, choice: str) -> tuple[float, int]:
    """Log-probability of a choice and its tokens: one item, full logits, no padding."""
    import torch

    prompt = item.prompt
    answer = tokenizer(choice, add_special_tokens=False)["input_ids"]
    if task.chat:
        prompt = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        answer = [*answer, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.bos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([ids + answer])).logits[0]
    table = torch.log_softmax(logits.double(), dim=-1)
    return sum(table[len(ids) - 1 + i, token].item() for i, token in enumerate(answer)), len(answer)


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
    assert calls[-1] == (26, 26) and calls == sorted(calls)
    read = Evaluation.from_dict(json.loads(json.dumps(first.to_dict(), allow_nan=False)))
    assert read == first
    assert set(first.score("a", "loss").subtasks) == {"places", "sums"}
    assert [column.name for column in first.table("loss").columns] == ["model", "loss", "places", "sums"]
    assert len(first.table().rows) == 2
    with pytest.raises(DataError, match="did you mean 'choice'"):
        first.table("choise")


def test_a_live_model_keeps_its_mode(tokenizer: Any) -> None:
    model = tiny().train()
    evaluate([("tiny", model, tokenizer)], [LOSS], resamples=10)
    assert model.training


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
    with pytest.raises(DataError, match="experts: unknown task"):
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


def test_normalised_scores() -> None:
    assert normalised_score(2.0, 1.25, 1.0) == 0.75
    assert normalised_score(0.2, 0.5, 0.6) == pytest.approx(0.75)
    assert math.isnan(normalised_score(1.0, 0.5, 1.0))


def made_up(losses: dict[str, list[float]]) -> Evaluation:
    from graftkit.measuring.results import ItemScore, TaskSummary, summarise

    task = TaskSummary("t", "answer_loss", False, "", "", 20)
    scores = tuple(
        summarise(name, task, tuple(ItemScore("", 0, (-v,), (1,), (1,)) for v in values), 0.0, resamples=500, seed=0)
        for name, values in losses.items()
    )
    settings = {"seed": 0, "resamples": 500}
    return Evaluation(tuple(losses), (task,), scores, {}, "base", {"t": "expert"}, settings)


def test_normalised_scores_need_an_expert_that_learned_something() -> None:
    from graftkit.measuring.comparison import normalised_table

    noise = np.random.default_rng(0).normal(0, 0.1, 20)
    clear = made_up({"base": list(3 + noise), "merged": list(2.5 + noise), "expert": list(2 + noise)})
    scores = normalised_scores(clear, "merged")
    assert scores["t"].value == scores["mean"].value == pytest.approx(0.5)
    assert scores["t"].low == pytest.approx(0.5) and scores["t"].high == pytest.approx(0.5)
    assert normalised_scores(clear, "expert")["t"].value == 1
    unclear = made_up({"base": list(3 + noise), "merged": list(2.5 + noise), "expert": list(3 - noise)})
    assert math.isnan(normalised_scores(unclear, "merged")["t"].value)
    assert "no score on t" in normalised_table(unclear).note


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_a_described_task_loads(tmp_path: Path) -> None:
    write(
        tmp_path / "d.jsonl",
        {"prompt": "p\u2028q", "answer": "a", "subtask": "s", "id": 3},
        {"prompt": "", "answer": "b"},
    )
    (tmp_path / "t.yaml").write_text("name: sums\nkind: answer_loss\ndata: d.jsonl\nchat: true\ndescription: easy\n")
    task = load_task(tmp_path / "t.yaml")
    assert (task.name, task.kind, task.chat, task.description) == ("sums", "answer_loss", True, "easy")
    assert task.items == (Item("p\u2028q", ("a",), 0, "s"), Item("", ("b",)))
    assert len(task.fingerprint) == 64


def test_a_bare_file_is_a_task(tmp_path: Path) -> None:
    path = write(tmp_path / "quiz.jsonl", {"prompt": "p", "choices": ["a", "b"], "answer": 1})
    assert load_task(path).kind == "multiple_choice" and load_task(path).name == "quiz"
    path = write(tmp_path / "plain.jsonl", {"prompt": "p", "answer": "a"})
    assert load_task(path).kind == "answer_loss"


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"prompt": "p", "anser": "a"}, r"d\.jsonl:2: unknown field 'anser'; did you mean 'answer'\?"),
        ({"prompt": "p"}, r"d\.jsonl:2: answer is missing"),
        ({"prompt": 3, "answer": "a"}, r"d\.jsonl:2: prompt: expected a text, got 3"),
        ({"prompt": "p", "answer": ""}, r"d\.jsonl:2: answer: expected a text, got an empty one"),
        (["p"], r"d\.jsonl:2: expected an object"),
    ],
)
def test_a_bad_record_is_named_by_its_line(tmp_path: Path, second: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_task(write(tmp_path / "d.jsonl", {"prompt": "p", "answer": "a"}, second))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"choices": ["a", "b"], "answer": 2}, "answer: expected an index from 0 to 1, got 2"),
        ({"choices": ["a", "b"], "answer": True}, "answer: expected an integer, got True"),
        ({"choices": ["a"], "answer": 0}, "expected two or more texts"),
        ({"choices": ["a", "a"], "answer": 0}, "two are the same"),
    ],
)
def test_bad_choices_are_refused(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_task(write(tmp_path / "d.jsonl", {"prompt": "p"} | record))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: answer_loss\ndatta: d.jsonl\n", "unknown key 'datta'; did you mean 'data'"),
        ("kind: answer_los\ndata: d.jsonl\n", "unknown kind 'answer_los'; did you mean 'answer_loss'"),
        ("kind: answer_loss\n", "data is missing"),
        ("kind: answer_loss\ndata: no.jsonl\n", "does not exist"),
        ("kind: answer_loss\ndata: d.jsonl\nchat: 1\n", "chat: expected true or false, got 1"),
        ("- a\n", "expected keys name, kind"),
        ("a: [\n", "not YAML"),
        ("kind: multiple_choice\ndata: d.jsonl\n", r"d\.jsonl:1: choices is missing"),
    ],
)
def test_a_bad_description_is_refused(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "d.jsonl", {"prompt": "p", "answer": "a"})
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        load_task(tmp_path / "t.yaml")


def test_files_that_are_no_tasks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "torn.jsonl").write_text('\n{"prompt": "p"')
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    (tmp_path / "x.csv").write_text("a")
    for name, message in [
        ("absent.yaml", "no such file"),
        ("empty.jsonl", "no records"),
        ("torn.jsonl", r"torn\.jsonl:2: not JSON"),
        ("latin.jsonl", "not UTF-8"),
        ("x.csv", "got '.csv'"),
    ]:
        with pytest.raises(DataError, match=message):
            load_task(tmp_path / name)
