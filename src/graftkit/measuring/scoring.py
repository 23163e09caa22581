"""Log-probabilities of answers under a language model.

Two savings, each tried against the plain way on each model and given up where the two differ: the output head is
applied only where an answer is predicted, and the choices of one item share a row, each attending to the prompt and to
itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftkit.data.tasks import Task
from graftkit.errors import NonFiniteError
from graftkit.measuring.encoding import Row, encode
from graftkit.measuring.results import ItemScore

_HEAD_POSITIONS = 512  # predictions taken through the output head at once


@dataclass(frozen=True)
class Scorer:
    """A model with the savings that were found to hold for it."""

    model: Any
    head_only: bool = False
    shared: bool = False


def score_task(
    model: Any, tokenizer: Any, task: Task, batch_tokens: int, advance: Callable[[int], None] = lambda done: None
) -> tuple[ItemScore, ...]:
    """Every item of a task under a model in evaluation mode; `advance` is called with the answers done by each batch.

    Raises DataError as `encode` does, and NonFiniteError where the model's output is not finite.
    """
    rows = encode(tokenizer, task, _context(model))
    slots = sum(len(row.slots) for row in rows)
    totals = log_probs(choose_scorer(model, rows), rows, slots, batch_tokens, advance)
    if not np.isfinite(totals).all():
        raise NonFiniteError(f"task {task.name}: the model gives log-probabilities that are not finite")
    return tuple(
        ItemScore(
            subtask=item.subtask,
            answer=item.answer,
            log_probs=tuple(float(totals[index]) for index in row.slots),
            tokens=tuple(map(len, row.answers)),
            bytes=tuple(len(choice.encode()) for choice in item.choices),
        )
        for item, row in zip(task.items, rows, strict=True)
    )


def choose_scorer(model: Any, rows: Sequence[Row]) -> Scorer:
    """A scorer with those savings that agree with the plain way, tried on two rows.

    Sharing is tried on the longest row where attention has a window, which only a long row would show, else on the
    shortest.
    """
    head_only = _has_plain_head(model) and _agree(Scorer(model), Scorer(model, head_only=True), [_start(rows[0])])
    several = [row for row in rows if len(row.answers) > 1]
    if not several or not _takes_layout(model):
        return Scorer(model, head_only)
    tried = (max if _has_window(model) else min)(several, key=lambda row: row.length)
    shared = _agree(Scorer(model, head_only), Scorer(model, head_only, shared=True), [tried])
    return Scorer(model, head_only, shared)


def log_probs(
    scorer: Scorer,
    rows: Sequence[Row],
    slots: int,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Summed log-probabilities (nats) of all answers, `[slots]`, in batches of rows of similar length."""
    import torch

    totals = np.zeros(slots)
    with torch.inference_mode():
        for batch in batches(rows if scorer.shared else [one for row in rows for one in _apart(row)], batch_tokens):
            found = [prediction for row in batch for prediction in row.predictions()]
            values = _predicted(scorer, batch)
            np.add.at(totals, [slot for _, _, slot in found], values)
            advance(sum(len(row.answers) for row in batch))
    return totals


def batches(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Rows from long to short, in batches that hold at most `batch_tokens` tokens with padding (or one row)."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -row.length):
        if batch and (len(batch) + 1) * batch[0].length > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _predicted(scorer: Scorer, batch: Sequence[Row]) -> np.ndarray:
    """The log-probability of each answer token of a batch, in the order of its predictions."""
    import torch

    places = [(index, *prediction) for index, row in enumerate(batch) for prediction in row.predictions()]
    row, source, target = torch.tensor([place[:3] for place in places], device=scorer.model.device).T
    inputs = _inputs(batch, scorer.model, scorer.shared)
    if scorer.head_only:
        states, head = scorer.model.base_model(**inputs).last_hidden_state, scorer.model.get_output_embeddings()
    else:
        states, head = scorer.model(**inputs).logits, torch.nn.Identity()
    found = []
    for chunk in torch.arange(len(places), device=row.device).split(_HEAD_POSITIONS):
        logits = head(states[row[chunk], source[chunk]]).float()  # [chunk, vocabulary]
        found.append(logits.gather(1, target[chunk, None])[:, 0] - logits.logsumexp(dim=1))
    return torch.cat(found).double().cpu().numpy()


def _inputs(batch: Sequence[Row], model: Any, shared: bool) -> dict[str, Any]:
    """The model's inputs for rows padded on the right, `[rows, longest]`."""
    import torch

    longest = max(row.length for row in batch)
    ids, positions = torch.zeros((2, len(batch), longest), dtype=torch.long)
    segments = torch.full((len(batch), longest), -1)
    for index, row in enumerate(batch):
        laid = torch.tensor(row.layout())
        ids[index, : row.length], positions[index, : row.length], segments[index, : row.length] = laid
    inputs = {"input_ids": ids, "attention_mask": (segments >= 0).long()}
    if shared:
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": _shared_mask(segments, model.dtype)}
    return {name: tensor.to(model.device) for name, tensor in inputs.items()} | {"use_cache": False}


def _shared_mask(segments: Any, dtype: Any) -> Any:
    """What is added to attention scores, so that a token sees earlier tokens of the prompt and of its own answer."""
    import torch

    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()
    seen = causal & ((key == 0) | (key == query))
    blocked = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return blocked[:, None]  # [rows, 1, queries, keys]


def _apart(row: Row) -> list[Row]:
    return [Row(row.prompt, (answer,), (slot,)) for slot, answer in zip(row.slots, row.answers, strict=True)]


def _start(row: Row) -> Row:
    """The last tokens of a prompt and the first of an answer: enough to compare two ways of computing."""
    return Row(row.prompt[-8:], (row.answers[0][:8],), (0,))


def _agree(plain: Scorer, fast: Scorer, rows: Sequence[Row]) -> bool:
    import torch

    slots = max(max(row.slots) for row in rows) + 1
    tokens = sum(len(answer) for row in rows for answer in row.answers)
    budget = sum(row.length for row in rows)
    gap = np.abs(log_probs(plain, rows, slots, budget) - log_probs(fast, rows, slots, budget)).sum() / tokens
    return bool(gap < (1e-4 if plain.model.dtype == torch.float32 else 0.05))


def _has_plain_head(model: Any) -> bool:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    backbone = getattr(model, "base_model", model)
    capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return head is not None and backbone is not model and not capped


def _has_window(model: Any) -> bool:
    config = model.config.get_text_config()
    return any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))


def _context(model: Any) -> int | None:
    """How many positions the model was made for, if its configuration says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _takes_layout(model: Any) -> bool:
    """Whether positions and a mask per pair of tokens can be given to the model."""
    attention = getattr(model.config, "_attn_implementation", "eager")
    return attention in ("eager", "sdpa") and "position_ids" in inspect.signature(model.forward).parameters
