"""How models differ in what a layer answers: second moments of their deltas' outputs, one channel at a time.

For each matrix and each model s, run on examples of its own domain, with x the inputs that it gets there:
`moments[s, t, u, i] = mean over tokens of (D_t x)_i (D_u x)_i`, D_t the delta of model t: T^3 numbers for each channel,
added up while the model runs; activations are not kept, and no matrix as large as a weight is made for adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graftkit.measuring.activations import Listener, linear_layers, run
from graftkit.measuring.encoding import Row

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Delta:
    """A model's delta of one matrix: `left @ right`, or whole in `right`; nothing where the model leaves it alone."""

    left: Tensor | None = None
    right: Tensor | None = None

    def answer(self, inputs: Tensor) -> Tensor | None:
        """`D x` for inputs [tokens, in]: [tokens, out]."""
        if self.right is None:
            return None
        inner = inputs @ self.right.T
        return inner if self.left is None else inner @ self.left.T


@dataclass
class Moments:
    """The moments of one matrix under one model, float64 [models, models, out], and the tokens that they are of."""

    deltas: Sequence[Delta]
    total: Tensor
    tokens: int = field(default=0)

    def add(self, inputs: Tensor) -> None:
        """Takes the inputs [tokens, in] of a batch into account."""
        answers = [delta.answer(inputs) for delta in self.deltas]
        for t, one in enumerate(answers):
            for u in range(t, len(answers)):
                other = answers[u]
                if one is not None and other is not None:
                    found = (one * other).sum(dim=0).double()
                    self.total[t, u] += found
                    if u > t:
                        self.total[u, t] += found
        self.tokens += len(inputs)

    def mean(self) -> Any:
        """The mean over tokens, a numpy array."""
        return (self.total / max(self.tokens, 1)).cpu().numpy()


def measure(
    model: Any,
    rows: Sequence[Row],
    deltas: dict[str, list[Delta]],
    *,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """The mean moments of each matrix, by name, of a `transformers` model that runs on some rows; all tokens count.

    Raises PlanError for a matrix that is no linear layer's weight in the live model.
    """
    layers = linear_layers(model, deltas, what=_NO_GATES)
    held = {name: _empty(deltas[name], module) for name, module in layers.items()}
    listeners = [Listener(module, inputs=held[name].add) for name, module in layers.items()]
    run(model, rows, listeners, batch_tokens=batch_tokens, advance=advance)
    return {name: moments.mean() for name, moments in held.items()}


_NO_GATES = "so there are no gates to solve for it; add a rule with `knobs: {local_signal: none}` for it"


def _empty(deltas: Sequence[Delta], module: Any) -> Moments:
    import torch

    shape = (len(deltas), len(deltas), module.out_features)
    return Moments(deltas, torch.zeros(shape, dtype=torch.float64, device=module.weight.device))
