"""Records to token tensors, and the loss that counts the answers only."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from records import Record

LENGTH = 256
TURN_END = "<|im_end|>"
IGNORED = -100  # the label of a token that no loss counts, as transformers has it
Batch = dict[str, torch.Tensor]
"""`input_ids`, `attention_mask` and `labels`, all `[items, length]`; the labels of prompt and padding are IGNORED."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt and answer; the answer starts at `start`."""

    ids: tuple[int, ...]
    start: int


def encode(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, chat: bool, length: int = LENGTH
) -> list[Encoded]:
    """Tokenise each record, cut at `length`; a record whose prompt leaves no room for an answer is dropped."""
    encoded = []
    for record in records:
        prompt, answer = record.prompt, record.answer
        if chat:
            turn = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            answer += TURN_END
        start = tokenizer(prompt).input_ids
        if len(start) < length - 8:
            encoded.append(Encoded(tuple(start + tokenizer(answer).input_ids)[:length], len(start)))
    return encoded


def collate(items: Sequence[Encoded], pad: int) -> Batch:
    """Pad on the right."""
    longest = max(len(item.ids) for item in items)
    ids = torch.full((len(items), longest), pad)
    attention, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, item in enumerate(items):
        end = len(item.ids)
        ids[row, :end] = torch.tensor(item.ids)
        attention[row, :end] = 1
        labels[row, item.start : end] = ids[row, item.start : end]
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def batches(items: Sequence[Encoded], size: int, pad: int, seed: int) -> Iterator[Batch]:
    """Endless shuffled batches; within a pool of eight batches, items of like length go together."""
    source, order = random.Random(seed), list(items)
    while True:
        source.shuffle(order)
        for low in range(0, len(order) - size + 1, 8 * size):
            pool = sorted(order[low : low + 8 * size], key=lambda item: len(item.ids))
            groups = [pool[at : at + size] for at in range(0, len(pool) - size + 1, size)]
            source.shuffle(groups)
            yield from (collate(group, pad) for group in groups)


def answer_tokens(batch: Batch) -> int:
    """How many tokens the loss counts."""
    return int((batch["labels"] != IGNORED).sum())


def summed_answer_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Summed cross-entropy of the answer tokens; the vocabulary is only scored where one of them is predicted."""
    outputs = model.model(**{name: value for name, value in batch.items() if name != "labels"})
    wanted = batch["labels"][:, 1:]
    counted = wanted != IGNORED
    scores = model.lm_head(outputs.last_hidden_state[:, :-1][counted])  # [answer tokens, vocabulary]
    return torch.nn.functional.cross_entropy(scores.float(), wanted[counted], reduction="sum")


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, items: Sequence[Encoded], pad: int, size: int = 4) -> float:
    """Mean loss per answer token over all items."""
    batched = [collate(items[low : low + size], pad) for low in range(0, len(items), size)]
    batched = [{key: value.to(model.device) for key, value in batch.items()} for batch in batched]
    total = sum(float(summed_answer_loss(model, batch)) for batch in batched)
    return total / sum(map(answer_tokens, batched))
