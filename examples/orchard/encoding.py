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


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt and answer; the answer starts at `start`."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Batch:
    """Padded ids and masks, all `[items, length]`; `counted` marks the answer tokens."""

    ids: torch.Tensor
    attention: torch.Tensor
    counted: torch.Tensor


def encode(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[Encoded]:
    """Tokenise each record, cut at LENGTH; a record whose prompt leaves no room for an answer is dropped."""
    encoded = []
    for record in records:
        prompt, answer = record.prompt, record.answer
        if chat:
            turn = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            answer += TURN_END
        start = tokenizer(prompt).input_ids
        if len(start) < LENGTH - 8:
            encoded.append(Encoded(tuple(start + tokenizer(answer).input_ids)[:LENGTH], len(start)))
    return encoded


def collate(items: Sequence[Encoded], pad: int) -> Batch:
    """Pad on the right."""
    longest = max(len(item.ids) for item in items)
    ids = torch.full((len(items), longest), pad)
    attention, counted = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, item in enumerate(items):
        end = len(item.ids)
        ids[row, :end] = torch.tensor(item.ids)
        attention[row, :end] = 1
        counted[row, item.start : end] = True
    return Batch(ids, attention, counted)


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


def answer_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the answer tokens; the vocabulary is only scored where an answer token is predicted."""
    outputs = model.model(input_ids=batch.ids, attention_mask=batch.attention)
    hidden = outputs.last_hidden_state  # [items, length, width]
    wanted = batch.counted[:, 1:]
    scores = model.lm_head(hidden[:, :-1][wanted])  # [answer tokens, vocabulary]
    return torch.nn.functional.cross_entropy(scores.float(), batch.ids[:, 1:][wanted])


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, items: Sequence[Encoded], pad: int, size: int = 4) -> float:
    """Mean loss per answer token over all items."""
    total = count = 0.0
    for low in range(0, len(items), size):
        batch = collate(items[low : low + size], pad)
        tokens = int(batch.counted.sum())
        total += float(answer_loss(model, batch)) * tokens
        count += tokens
    return total / count
