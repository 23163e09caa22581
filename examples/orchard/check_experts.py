"""Measure the base and each committed adapter on the tasks that need no generation, and print one table.

The same numbers as `graft evaluate` by other code, plain and slow, without graftkit; from the root of the repository:

    python examples/orchard/check_experts.py --threads 2
    python examples/orchard/check_experts.py --tasks math_wide --adapters base math-wide    # generated, when named
"""

from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from encoding import TURN_END
from prepare_model import MODEL_DIR
from records import read_lines

HERE = Path(__file__).resolve().parent


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: dict[str, Any]) -> str:
    """Mean loss per answer token over the items, or the count of questions answered right."""
    rows = read_lines(HERE / "tasks" / task["data"])
    if task["kind"] == "answer_loss":
        scored = [_score(model, tokenizer, row["prompt"], row["answer"], task["chat"]) for row in rows]
        return f"{-sum(total for total, _ in scored) / sum(count for _, count in scored):.4f}"
    if task["kind"] == "exact_match":
        answers = [_generate(model, tokenizer, row["prompt"], task["max_new_tokens"]) for row in rows]
        together = zip(rows, answers, strict=True)
        right = sum(_read(row["answer"], task) == _read(answer, task) for row, answer in together)
        return f"{right}/{len(rows)}"
    right = 0
    for row in rows:
        totals = [_score(model, tokenizer, row["prompt"], choice, task["chat"]) for choice in row["choices"]]
        best = max(range(len(totals)), key=lambda index: totals[index][0] / len(row["choices"][index].encode()))
        right += best == row["answer"]
    return f"{right}/{len(rows)}"


@torch.no_grad()
def _generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, most: int) -> str:
    """The greedy reply to one user's message, token by token."""
    turn = [{"role": "user", "content": prompt}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    ids, written, past = tokenizer(prompt).input_ids, "", None
    for _ in range(most):
        found = model(input_ids=torch.tensor([ids]), past_key_values=past, use_cache=True, logits_to_keep=1)
        ids, past = [int(found.logits[0, -1].argmax())], found.past_key_values
        written += tokenizer.decode(ids)
        if TURN_END in written:
            break
    return written.split(TURN_END)[0]


def _read(text: str, task: dict[str, Any]) -> str:
    """What counts of an answer: its last number, or its first line but for case and closing punctuation."""
    if task["normalise"] == ["last_number"]:
        return (re.findall(r"\d+(?:\.\d+)?", text.replace(",", "")) or ["nothing"])[-1]
    return text.strip().split("\n")[0].strip(" .!?").casefold()


@torch.no_grad()
def _score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, chat: bool
) -> tuple[float, int]:
    """Log-likelihood of the answer and its number of tokens."""
    if chat:
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        answer += TURN_END
    start, end = tokenizer(prompt).input_ids, tokenizer(answer).input_ids
    logits = model(input_ids=torch.tensor([start + end]), logits_to_keep=len(end) + 1).logits[0, :-1]
    chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(end)[:, None])
    return float(chosen.sum()), len(end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tasks", nargs="*", help="task names; default: all without generation")
    parser.add_argument("--adapters", nargs="*", help="adapter names; default: all, and the base")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tasks = [yaml.safe_load(path.read_text()) for path in sorted((HERE / "tasks").glob("*.yaml"))]
    quick = [task["name"] for task in tasks if task["kind"] in ("answer_loss", "multiple_choice")]
    tasks = [task for task in tasks if task["name"] in (arguments.tasks or quick)]
    names = arguments.adapters or ["base", *sorted(path.name for path in (HERE / "adapters").iterdir())]
    print("model", *(task["name"] for task in tasks), sep="\t")
    for name in names:
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
        if name != "base":
            model = peft.PeftModel.from_pretrained(model, HERE / "adapters" / name).merge_and_unload()
        scores = [measure(model.eval(), tokenizer, task) for task in tasks]
        print(name, *scores, f"{time.perf_counter() - start:.0f} s", sep="\t", flush=True)


if __name__ == "__main__":
    main()
