"""How models differ in what a layer answers: second moments of their deltas' outputs, one channel at a time.

For each matrix and each model s, run on examples of its own domain, with x the inputs that it gets there:
`moments[s, t, u, i] = mean over tokens of (D_t x)_i (D_u x)_i`, D_t the delta of model t: T^3 numbers for each channel,
added up while the model runs; activations are not kept, and no matrix as large as a weight is made for adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graftkit.errors import PlanError
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
    import torch

    from graftkit.measuring.scoring import batches

    device = next(model.parameters()).device
    held = {name: _empty(own, module) for name, own, module in _modules(model, deltas)}
    mask = torch.zeros(0, dtype=torch.bool)
    hooked = [(module, held[name]) for name, _, module in _modules(model, deltas)]
    with torch.inference_mode(), _listening(hooked, lambda: mask):
        for batch in batches(rows, batch_tokens):
            ids, mask = _padded(batch)
            mask = mask.to(device)
            model(input_ids=ids.to(device), attention_mask=mask.long(), use_cache=False, logits_to_keep=1)
            advance(len(batch))
    return {name: moments.mean() for name, moments in held.items()}


def _empty(deltas: list[Delta], module: Any) -> Moments:
    import torch

    shape = (len(deltas), len(deltas), module.out_features)
    return Moments(deltas, torch.zeros(shape, dtype=torch.float64, device=module.weight.device))


def _modules(model: Any, deltas: dict[str, list[Delta]]) -> Iterator[tuple[str, list[Delta], Any]]:
    """Each matrix with the linear layer whose weight it is, under its own name or with `model.` before or not."""
    import torch

    found = dict(model.named_modules())
    for name, own in deltas.items():
        path = name.removesuffix(".weight")
        module = next((found[p] for p in (path, f"model.{path}", path.removeprefix("model.")) if p in found), None)
        if not isinstance(module, torch.nn.Linear):
            raise PlanError(
                f"{name!r} is not the weight of a linear layer of the live model, so there are no gates to solve for "
                "it; add a rule with `knobs: {local_signal: none}` for it"
            )
        yield name, own, module


@contextmanager
def _listening(hooked: Sequence[tuple[Any, Moments]], mask: Callable[[], Tensor]) -> Iterator[None]:
    """Lets moments hear what their layers get, less the padding."""

    def hear(moments: Moments) -> Callable[..., None]:
        return lambda module, inputs: moments.add(inputs[0].reshape(-1, inputs[0].shape[-1])[mask().reshape(-1)])

    handles = [module.register_forward_pre_hook(hear(moments)) for module, moments in hooked]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _padded(batch: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Token ids, padded on the right, and which are real: [rows, length] each."""
    import torch

    texts = [row.layout()[0] for row in batch]
    ids = torch.zeros((len(texts), max(map(len, texts))), dtype=torch.long)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for k, text in enumerate(texts):
        ids[k, : len(text)] = torch.tensor(text)
        mask[k, : len(text)] = True
    return ids, mask
