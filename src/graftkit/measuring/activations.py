"""What passes through the linear layers of a live model while it runs on encoded rows: inputs and outputs, no padding.

    layers = linear_layers(model, ["model.layers.0.mlp.down_proj.weight"])        # by the weights' names on disk
    listeners = [Listener(module, inputs=collect) for module in layers.values()]  # collect(x), x [tokens, in]
    run(model, rows, listeners, batch_tokens=2048)

Whoever drives several models over the same batches, or takes gradients, does by hand what `run` does:

    with listening(listeners) as hearing:
        for batch in batches(rows, batch_tokens):
            forward(model, batch, hearing)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.errors import PlanError
from graftkit.measuring.encoding import Row
from graftkit.measuring.images import inputs_of
from graftkit.measuring.scoring import batches
from graftkit.recipes import layout

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Hear", "Hearing", "Listener", "batches", "forward", "linear_layers", "listening", "padded", "run", "shared"]

Hear = Callable[["Tensor"], None]
"""Gets the real tokens of a batch, in the order of its rows: [tokens, features]."""


@dataclass(frozen=True)
class Listener:
    """A module and who hears what it gets and what it answers."""

    module: Any
    inputs: Hear | None = None
    outputs: Hear | None = None


@dataclass
class Hearing:
    """Which tokens of the present batch are real: places among all `length` of them, all where `places` is None."""

    places: Tensor | None = None
    length: int = 0

    def pad(self, mask: Tensor) -> None:
        """Learns the present batch's mask [rows, length]."""
        self.length = mask.numel()
        self.places = None if bool(mask.all()) else mask.reshape(-1).nonzero()[:, 0]

    def real(self, values: Tensor) -> Tensor:
        """Those, [tokens, features], of [rows, length, features]; all where these are not as many: patches."""
        flat = values.reshape(-1, values.shape[-1])
        return flat if self.places is None or self.length != len(flat) else flat.index_select(0, self.places)


def linear_layers(
    model: Any, names: Iterable[str], *, turned: bool = False, what: str = "so nothing can be measured there"
) -> dict[str, Any]:
    """The linear layer of a live model that has each of these weights, by the weights' names on disk.

    `turned`: layers that keep their weights as [in, out] (`Conv1D`) are wanted too. `what` ends the refusal.
    Raises PlanError for a weight of anything else, the experts of a mixture that stand in one tensor included.
    """
    import torch

    names = list(names)
    kinds = (torch.nn.Linear, _conv1d()) if turned else (torch.nn.Linear,)
    modules = {f"{path}.weight": module for path, module in model.named_modules() if hasattr(module, "weight")}
    places = layout.live_names(names, modules)
    found = {}
    for name in names:
        module = modules.get(places.get(name, ""))
        if not isinstance(module, kinds):
            raise PlanError(f"{name!r} {_reason(name, module)}, {what}")
        found[name] = module
    return found


def _conv1d() -> Any:
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def _reason(name: str, module: Any) -> str:
    if isinstance(module, _conv1d()):
        return "is kept as [in, out] (Conv1D)"
    if layout.EXPERTS.search(name):
        return "is of an expert of a mixture, which the live model keeps in one tensor with the others"
    return "is not the weight of a linear layer of the live model"


def run(
    model: Any,
    rows: Sequence[Row],
    listeners: Sequence[Listener],
    *,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda done: None,
) -> None:
    """Runs a model over rows, the long ones first, at most `batch_tokens` at once; `advance` is told each batch's rows.

    All real tokens are heard. The output head is applied to one token of each row, unless it is listened to.
    """
    import torch

    with torch.inference_mode(), listening(listeners) as hearing:
        for batch in batches(rows, batch_tokens):
            forward(model, batch, hearing, head=_hears_head(model, listeners))
            advance(len(batch))


def forward(model: Any, batch: Sequence[Row], hearing: Hearing | None = None, *, head: bool = False) -> Any:
    """The model's output for a batch, whose padding `hearing` learns; without `head` logits of the last place only."""
    device = next(model.parameters()).device
    ids, mask = padded(batch)
    mask = mask.to(device)
    if hearing is not None:
        hearing.pad(mask)
    kept: dict[str, Any] = {} if head or not _keeps_logits(model) else {"logits_to_keep": 1}
    media = inputs_of([row.pictures for row in batch], [row.length for row in batch], ids.shape[1])
    kept |= {name: value.to(device) for name, value in media.items()}
    return model(input_ids=ids.to(device), attention_mask=mask.long(), use_cache=False, **kept)


def _keeps_logits(model: Any) -> bool:
    import inspect

    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _hears_head(model: Any, listeners: Sequence[Listener]) -> bool:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head is not None and any(listener.module is head for listener in listeners)


@contextmanager
def listening(listeners: Sequence[Listener]) -> Iterator[Hearing]:
    """Lets the listeners hear the model's passes until the block ends; whoever runs it tells `Hearing` the padding."""
    hearing = Hearing()

    def before(hear: Hear) -> Callable[..., None]:
        return lambda module, given: hear(hearing.real(given[0]))

    def after(hear: Hear) -> Callable[..., None]:
        return lambda module, given, answer: hear(hearing.real(answer))

    handles = [one.module.register_forward_pre_hook(before(one.inputs)) for one in listeners if one.inputs]
    handles += [one.module.register_forward_hook(after(one.outputs)) for one in listeners if one.outputs]
    try:
        yield hearing
    finally:
        for handle in handles:
            handle.remove()


def shared(model: Any, layers: Mapping[str, Any], row: Row) -> dict[str, str]:
    """For each layer by name, the first of those that get the very same tensor as their input: q for q, k and v."""
    import torch

    first: dict[int, str] = {}
    held: list[Any] = []  # alive to the end, or a number would be given twice
    found: dict[str, str] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: Any, given: tuple[Any, ...]) -> None:
            held.append(given[0])
            found.setdefault(name, first.setdefault(id(given[0]), name))

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, module in layers.items()]
    try:
        with torch.inference_mode():
            forward(model, [row])
    finally:
        for handle in handles:
            handle.remove()
    return found


def padded(batch: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Token ids, padded on the right, and which are real: [rows, length] each."""
    import torch

    texts = [row.layout()[0] for row in batch]
    ids = torch.zeros((len(texts), max(map(len, texts))), dtype=torch.long)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for k, text in enumerate(texts):
        ids[k, : len(text)] = torch.tensor(text)
        mask[k, : len(text)] = True
    return ids, mask
