"""Answers that a model generates: greedy, in batches of prompts of similar length, with the model's own KV cache.

`transformers` generates. Settings that a checkpoint brings along (a repetition penalty, sampling, its own limits) are
set aside, so that every model answers under the same rules; only its tokens that end a text count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from graftkit.data.tasks import Generation, Task
from graftkit.errors import DataError, NonFiniteError
from graftkit.measuring.encoding import Prompt, end_of_turn, prompts
from graftkit.measuring.images import inputs_of, tokenizer_of

_ROOM = 4  # times the tokens of a scoring batch: a step computes one token a row, so rows may be many


@dataclass(frozen=True)
class Reply:
    """What a model wrote, up to a stop or an end; `finished` where it came to one."""

    text: str
    tokens: int
    finished: bool


def generate(
    model: Any, reader: Any, task: Task, batch_tokens: int, advance: Callable[[int], None] = lambda done: None
) -> list[Reply]:
    """A reply to every item of a task, which has at least one; `advance` is called with the items done by each batch.

    `reader` is the model's tokenizer, or its processor, without which items have no images.

    Raises DataError as `prompts` does and where a prompt leaves no room for an answer, NonFiniteError where the model's
    output is NaN.
    """
    settings, tokenizer = task.generation or Generation(), tokenizer_of(reader)
    starts = prompts(reader, task)
    _check_room(model, task, starts, settings)
    ends = ends_of(model, reader, task)
    replies: dict[int, Reply] = {}
    order = sorted(range(len(starts)), key=lambda index: (_shapes(starts[index]), -len(starts[index].ids)))
    for batch in _batches(order, starts, settings.max_new_tokens, _ROOM * batch_tokens):
        ids = _generated(model, tokenizer, [starts[index] for index in batch], settings, ends, task.name)
        replies |= dict(zip(batch, (reply_of(tokenizer, row, settings, ends) for row in ids), strict=True))
        advance(len(batch))
    return [replies[index] for index in range(len(starts))]


def _shapes(prompt: Prompt) -> tuple[Any, ...]:
    return prompt.media.shapes if prompt.media else ()


def _batches(order: Sequence[int], starts: Sequence[Prompt], new: int, budget: int) -> Iterator[list[int]]:
    """From long prompts to short ones, as many as fit the budget with padding and answers (or one).

    Images of one batch are of one shape.
    """
    batch: list[int] = []
    for index in order:
        full = batch and (len(batch) + 1) * (len(starts[batch[0]].ids) + new) > budget
        if full or (batch and _shapes(starts[batch[0]]) != _shapes(starts[index])):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _generated(
    model: Any, tokenizer: Any, starts: Sequence[Prompt], settings: Generation, ends: Sequence[int], name: str
) -> list[list[int]]:
    """New token ids of each prompt, as far as the longest answer of the batch."""
    import torch
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    longest = max(len(start.ids) for start in starts)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0] if ends else 0
    rows = [start.ids for start in starts]
    ids = torch.tensor([[padding] * (longest - len(row)) + list(row) for row in rows], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
    media = inputs_of(
        [(start.media,) if start.media else () for start in starts], [*map(len, rows)], longest, left=True
    )
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=settings.max_new_tokens, pad_token_id=padding,
        eos_token_id=list(ends) or None, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    stops = StoppingCriteriaList([_stopping(tokenizer, settings.stop, longest)] if settings.stop else [])
    with torch.inference_mode(), _own_settings(model, config):
        made = model.generate(
            ids, attention_mask=mask, generation_config=config, stopping_criteria=stops,
            logits_processor=LogitsProcessorList([_refuse_nan(name)]),
            **{name: value.to(model.device) for name, value in media.items()},
        )  # fmt: skip
    return [[int(token) for token in row] for row in made[:, longest:].cpu().tolist()]


@contextmanager
def _own_settings(model: Any, config: Any) -> Iterator[None]:
    """Without the generation settings that came with the checkpoint, which `generate` would fill into ours."""
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before


def _stopping(tokenizer: Any, stops: Sequence[str], start: int) -> Any:
    """Ends a row once a stop stands in its last tokens; what it ends too late is cut from the text afterwards."""
    import torch
    from transformers import StoppingCriteria

    tail = 1 + max(len(stop.encode()) for stop in stops)  # tokens: each stands for a byte at least

    class Stops(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            texts = [_text(tokenizer, row) for row in input_ids[:, start:][:, -tail:].tolist()]
            return torch.tensor([any(stop in text for stop in stops) for text in texts], device=input_ids.device)

    return Stops()


def _refuse_nan(name: str) -> Any:
    from transformers import LogitsProcessor

    class RefuseNan(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            if scores.isnan().any():
                raise NonFiniteError(f"task {name}: the model gives logits that are NaN")
            return scores

    return RefuseNan()


def reply_of(tokenizer: Any, ids: Sequence[int], settings: Generation, ends: Sequence[int]) -> Reply:
    """What stands before the first end and the first stop. A row that ended early is padded, perhaps by an end."""
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    written = list(ids) if end is None else list(ids[:end])
    text = _text(tokenizer, written)
    found = [place for place in map(text.find, settings.stop) if place >= 0]
    finished = end is not None or bool(found)
    return Reply(text[: min(found)] if found else text, len(written) + (end is not None), finished)


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def ends_of(model: Any, reader: Any, task: Task) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's, the checkpoint's, and in a chat the one that ends a turn."""
    own = getattr(model.generation_config, "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    ends = [tokenizer_of(reader).eos_token_id, *listed, *end_of_turn(reader, task)]
    return tuple(dict.fromkeys(int(token) for token in ends if token is not None))


def _check_room(model: Any, task: Task, starts: Sequence[Prompt], settings: Generation) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    number = max(range(len(starts)), key=lambda index: len(starts[index].ids))
    wanted = len(starts[number].ids) + settings.max_new_tokens
    if context is not None and wanted > context:
        raise DataError(
            f"task {task.name}, item {number}: a prompt of {len(starts[number].ids)} tokens and max_new_tokens of "
            f"{settings.max_new_tokens} make {wanted}, but the model takes {context}; lower max_new_tokens"
        )
