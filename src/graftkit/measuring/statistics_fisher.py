"""The diagonal of a language model's Fisher information, by one backward pass for each sequence.

`F = E (d log p(y) / d theta)^2`, every target token y drawn from the model's own prediction at its place. Scores of
tokens that are drawn so have no mean, given what stands before, so the products between places vanish in expectation,
and the square of one gradient of the whole sequence is an unbiased estimate. With the tokens of the examples in their
place it would measure the loss's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.errors import NonFiniteError, PlanError
from graftkit.measuring.activations import forward
from graftkit.measuring.encoding import Row
from graftkit.recipes import layout

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Diagonal:
    """The information per token of each parameter, float32, and its root mean square over all of them."""

    values: dict[str, Tensor]
    scale: float
    tokens: int


def diagonal(
    model: Any,
    rows: Sequence[Row],
    names: Iterable[str],
    *,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> Diagonal:
    """The diagonal information of parameters, by their names on disk; those that no gradient reaches have none.

    Raises PlanError for a name that is no parameter of the live model, NonFiniteError for a broken model.
    """
    import torch

    parameters = _parameters(model, list(names))
    totals = {name: torch.zeros_like(own, dtype=torch.float32) for name, own in parameters.items()}
    tokens = 0
    with torch.enable_grad():
        for number, row in enumerate(rows):
            model.zero_grad(set_to_none=True)
            source = torch.Generator().manual_seed(seed * 1_000_003 + number)
            (-_drawn(model, row, source)).backward()
            for name, own in parameters.items():
                if own.grad is not None:
                    totals[name].addcmul_(own.grad.float(), own.grad.float())
            tokens += row.length
            advance(1)
    model.zero_grad(set_to_none=True)
    values = {name: total.div_(max(tokens, 1)).cpu() for name, total in totals.items()}
    return Diagonal(values, _scale(values), tokens)


def _parameters(model: Any, names: list[str]) -> dict[str, Any]:
    held = dict(model.named_parameters(remove_duplicate=False))
    places = layout.live_names(names, held)
    lost = next((name for name in names if name not in places), None)
    if lost is not None:
        raise PlanError(
            f"{lost!r} is no parameter of the live model, so there is no Fisher information of it; give it another "
            "method by a rule"
        )
    for own in held.values():
        own.requires_grad_(True)
    return {name: held[places[name]] for name in names}


def _drawn(model: Any, row: Row, source: Any) -> Tensor:
    """The log-probability of tokens drawn from the predictions at all places of a row."""
    import torch

    logits = forward(model, [row], head=True).logits[0].float()  # [length, vocabulary]
    predicted = logits.log_softmax(dim=-1)
    chances = predicted.detach().exp().cpu()
    if not bool(torch.isfinite(chances).all()):
        raise NonFiniteError("the model gives log-probabilities that are not finite")
    tokens = torch.multinomial(chances, 1, generator=source).to(predicted.device)
    return predicted.gather(1, tokens).sum()


def _scale(values: dict[str, Tensor]) -> float:
    import torch

    count = sum(value.numel() for value in values.values())
    squares = sum(float(value.double().square().sum()) for value in values.values())
    return float(torch.tensor(squares / max(count, 1)).sqrt()) or 1.0
