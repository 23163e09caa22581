"""Log-probabilities of answers under a language model, and what it would have said in their place.

Two savings, each tried against the plain way on each model and given up where the two differ: the output head is
applied only where an answer is predicted, and what begins alike shares a row: the choices of one item, items whose
prompts begin alike. Each attends to the beginning and to itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from graftkit.data.tasks import Task
from graftkit.errors import NonFiniteError
from graftkit.measuring.encoding import Row, encode
from graftkit.measuring.images import inputs_of
from graftkit.measuring.joining import joined
from graftkit.measuring.results import ItemScore

_HEAD_POSITIONS = 512  # predictions taken through the output head at once


@dataclass(frozen=True)
class Scorer:
    """A model with the savings that were found to hold for it."""

    model: Any
    head_only: bool = False
    shared: bool = False


def score_task(
    model: Any, reader: Any, task: Task, batch_tokens: int, advance: Callable[[int], None] = lambda done: None
) -> tuple[ItemScore, ...]:
    """Every item of a task under a model in evaluation mode; `advance` is called with the answers done by each batch.

    `reader` is the model's tokenizer, or its processor, without which items have no images.

    Raises DataError as `encode` does, and NonFiniteError where the model's output is not finite.
    """
    rows = encode(reader, task, context_of(model))
    totals = np.zeros(sum(len(row.slots) for row in rows))
    for one in readings(model, rows, batch_tokens, advance):
        totals[one.slot] = one.log_probs.sum()
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


@dataclass(frozen=True)
class Reading:
    """What a model makes of one answer, token by token: log-probabilities (nats), and the token it finds likeliest."""

    slot: int
    log_probs: np.ndarray
    likeliest: tuple[int, ...]


def readings(
    model: Any, rows: Sequence[Row], batch_tokens: int, advance: Callable[[int], None] = lambda done: None
) -> Iterator[Reading]:
    """Every answer of the rows, in no order, with the savings that hold for this model."""
    scorer = choose_scorer(model, rows)
    return read(scorer, joined(rows) if scorer.shared else rows, batch_tokens, advance)


def choose_scorer(model: Any, rows: Sequence[Row]) -> Scorer:
    """A scorer with those savings that agree with the plain way, tried on some rows, with images and without.

    Sharing is tried on the longest row where attention has a window, which only a long row would show, else on the
    shortest; not at all where something goes along with a prompt's tokens, for then positions may depend on it.
    """
    firsts = [_start(kind[0]) for kind in _kinds(rows)]
    head_only = _has_plain_head(model) and _agree(Scorer(model), Scorer(model, head_only=True), firsts)
    several = [row for row in joined(rows) if len(row.answers) > 1]
    if not several or not _takes_layout(model) or any(not one.movable for row in rows for one in row.pictures):
        return Scorer(model, head_only)
    pick = max if _has_window(model) else min
    tried = [_pair(pick(kind, key=lambda row: row.length)) for kind in _kinds(several)]
    shared = _agree(Scorer(model, head_only), Scorer(model, head_only, shared=True), tried)
    return Scorer(model, head_only, shared)


def _kinds(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows without images and those with them, as far as there are any."""
    kinds = [[row for row in rows if bool(row.pictured) is seen] for seen in (False, True)]
    return [kind for kind in kinds if kind]


def log_probs(
    scorer: Scorer,
    rows: Sequence[Row],
    slots: int,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Summed log-probabilities (nats) of all answers, `[slots]`, in batches of rows of similar length."""
    totals = np.zeros(slots)
    for one in read(scorer, rows, batch_tokens, advance):
        totals[one.slot] = one.log_probs.sum()
    return totals


def read(
    scorer: Scorer, rows: Sequence[Row], batch_tokens: int, advance: Callable[[int], None] = lambda done: None
) -> Iterator[Reading]:
    """Every answer of the rows, in batches of rows of similar length."""
    import torch

    with torch.inference_mode():
        for batch in batches(rows if scorer.shared else [one for row in rows for one in row.apart()], batch_tokens):
            slots = np.array([slot for row in batch for _, _, slot in row.predictions()])
            values, likeliest = _predicted(scorer, batch)
            for slot in dict.fromkeys(slots.tolist()):
                own = slots == slot
                yield Reading(slot, values[own], tuple(likeliest[own].tolist()))
            advance(sum(len(row.answers) for row in batch))


def batches(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Rows from long to short, in batches that hold at most `batch_tokens` tokens with padding (or one row).

    Images of one batch are of one shape.
    """
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.pictured, -row.length)):
        full = batch and (len(batch) + 1) * batch[0].length > batch_tokens
        if full or (batch and batch[0].pictured != row.pictured):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _predicted(scorer: Scorer, batch: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """The log-probability of each answer token of a batch, and the likeliest token there, in the predictions' order."""
    import torch

    places = [(index, *prediction) for index, row in enumerate(batch) for prediction in row.predictions()]
    row, source, target = torch.tensor([place[:3] for place in places], device=scorer.model.device).T
    inputs = _inputs(batch, scorer.model, scorer.shared)
    if scorer.head_only:
        states, head = scorer.model.base_model(**inputs).last_hidden_state, scorer.model.get_output_embeddings()
    else:
        states, head = scorer.model(**inputs).logits, torch.nn.Identity()
    found, best = [], []
    for chunk in torch.arange(len(places), device=row.device).split(_HEAD_POSITIONS):
        logits = head(states[row[chunk], source[chunk]]).float()  # [chunk, vocabulary]
        found.append(logits.gather(1, target[chunk, None])[:, 0] - logits.logsumexp(dim=1))
        best.append(logits.argmax(dim=1))
    return torch.cat(found).double().cpu().numpy(), torch.cat(best).cpu().numpy()


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
    inputs |= inputs_of([row.pictures for row in batch], [row.length for row in batch], longest)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()} | {"use_cache": False}


def _shared_mask(segments: Any, dtype: Any) -> Any:
    """What is added to attention scores, so that a token sees earlier tokens of the prompt and of its own answer."""
    import torch

    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()
    seen = causal & ((key == 0) | (key == query))
    blocked = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return blocked[:, None]  # [rows, 1, queries, keys]


def _start(row: Row) -> Row:
    """The last tokens of a prompt (with images all) and the first of an answer: enough to compare two ways."""
    return Row(row.prompt if row.media else row.prompt[-8:], (row.answers[0][:8],), (0,), row.media)


def _pair(row: Row) -> Row:
    """Of several items that share a row the first two; choices of one item all stay."""
    return replace(row, answers=row.answers[:2], slots=row.slots[:2], given=row.given[:2]) if row.given else row


def _agree(plain: Scorer, fast: Scorer, rows: Sequence[Row]) -> bool:
    import torch

    most = 1e-4 if plain.model.dtype == torch.float32 else 0.05
    for row in rows:
        ways = [{one.slot: one.log_probs for one in read(way, [row], row.length)} for way in (plain, fast)]
        if np.mean(np.concatenate([np.abs(ways[0][slot] - ways[1][slot]) for slot in ways[0]])) >= most:
            return False
    return True


def _has_plain_head(model: Any) -> bool:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    backbone = getattr(model, "base_model", model)
    capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return head is not None and backbone is not model and not capped


def _has_window(model: Any) -> bool:
    config = model.config.get_text_config()
    return any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))


def context_of(model: Any) -> int | None:
    """How many positions the model was made for, if its configuration says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _takes_layout(model: Any) -> bool:
    """Whether positions and a mask per pair of tokens can be given to the model."""
    attention = getattr(model.config, "_attn_implementation", "eager")
    return attention in ("eager", "sdpa") and "position_ids" in inspect.signature(model.forward).parameters
