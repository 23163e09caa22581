"""A model that runs layer after layer over all batches, with what passes between the layers kept on disk.

What is measured of one layer is done with before the next one begins, so that memory holds the measurements of one
layer and not of all. Each layer runs inside its own model, its neighbours passing on what they get, so that masks,
positions and rotations are the model's own, whatever its architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.errors import PlanError
from graftkit.measuring.activations import Hearing, Listener, forward, listening
from graftkit.measuring.encoding import Row

if TYPE_CHECKING:
    from torch import Tensor


class _Enough(Exception):
    """Raised inside a model once the layer that is wanted has answered."""


class Layers:
    """The stack of layers of a model, and the batches that go through it; hidden states lie in `spool`."""

    def __init__(self, model: Any, batches: Sequence[Sequence[Row]], spool: Path) -> None:
        self.model, self.batches, self.spool = model, batches, spool
        self.layers = stack_of(model)
        self._tuples = False  # whether a layer answers a tuple, as in older models, or its hidden states alone

    def start(self, advance: Callable[[int], None] = lambda done: None) -> None:
        """What the first layer gets, of every batch, onto disk."""
        self._tuples = self._answers_tuples()
        for number, batch in enumerate(self.batches):
            with self._caught(0) as hidden:
                self._pass(batch, None)
            self._keep(number, hidden[0])
            advance(len(batch))

    def through(
        self, layer: int, listeners: Sequence[Listener] = (), advance: Callable[[int], None] = lambda done: None,
        *, keep: bool = True,
    ) -> None:  # fmt: skip
        """Sends all batches through one layer; with `keep` its answers take the place of what it got."""
        with listening(listeners) as hearing, self._alone(layer) as exchange:
            for number, batch in enumerate(self.batches):
                exchange.hidden = self._kept(number)
                self._pass(batch, hearing)
                if keep:
                    self._keep(number, exchange.hidden)
                advance(len(batch))

    def of(self, module: Any) -> int | None:
        """The number of the layer that a module is in; None outside of the stack."""
        return next((n for n, layer in enumerate(self.layers) if any(module is own for own in layer.modules())), None)

    def _pass(self, batch: Sequence[Row], hearing: Hearing | None) -> None:
        import torch

        with torch.inference_mode():
            try:
                forward(self.model, batch, hearing)
            except _Enough:
                return
        raise PlanError("the model's layers are not called one after the other; leave out --memory")

    def _keep(self, number: int, hidden: Tensor) -> None:
        import torch

        torch.save(hidden.cpu(), self.spool / f"{number}.pt")

    def _kept(self, number: int) -> Tensor:
        import torch

        return torch.load(self.spool / f"{number}.pt").to(next(self.model.parameters()).device)  # type: ignore[no-any-return]

    @contextmanager
    def _caught(self, layer: int) -> Iterator[list[Tensor]]:
        """The hidden states that a layer gets, at which the model stops."""
        found: list[Tensor] = []

        def catch(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            found.append(given[0] if given else named["hidden_states"])
            raise _Enough

        handle = self.layers[layer].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            yield found
        finally:
            handle.remove()

    @contextmanager
    def _alone(self, layer: int) -> Iterator[_Exchange]:
        """The model with layers that pass on what they get before this one, and none behind it."""
        exchange = _Exchange()
        for earlier in self.layers[:layer]:
            earlier.forward = _passing(self._tuples)
        handles = [
            self.layers[layer].register_forward_pre_hook(exchange.give, with_kwargs=True),
            self.layers[layer].register_forward_hook(exchange.take),
        ]
        try:
            yield exchange
        finally:
            for earlier in self.layers[:layer]:
                del earlier.forward
            for handle in handles:
                handle.remove()

    def _answers_tuples(self) -> bool:
        import torch

        found: list[bool] = []

        def look(module: Any, given: Any, answer: Any) -> None:
            found.append(isinstance(answer, tuple))

        handle = self.layers[0].register_forward_hook(look)
        try:
            with torch.inference_mode():
                forward(self.model, self.batches[0][-1:])
        finally:
            handle.remove()
        return found[0]


class _Exchange:
    """Puts hidden states in place of what a layer gets, and takes its answer."""

    hidden: Any = None

    def give(self, module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The hidden states, first among the layer's arguments."""
        return (self.hidden, *given[1:]), {k: v for k, v in named.items() if k != "hidden_states"}

    def take(self, module: Any, given: Any, answer: Any) -> None:
        """Keeps the answer, and stops the model."""
        self.hidden = answer[0] if isinstance(answer, tuple) else answer
        raise _Enough


def _passing(as_tuple: bool) -> Callable[..., Any]:
    def forward(hidden_states: Any, *others: Any, **named: Any) -> Any:
        return (hidden_states,) if as_tuple else hidden_states

    return forward


def stack_of(model: Any) -> Any:
    """The layers of a language model: the longest list of modules of one class. Raises PlanError where it has none."""
    import torch

    text = model.get_decoder() if hasattr(model, "get_decoder") else model
    lists = [module for module in text.modules() if isinstance(module, torch.nn.ModuleList)]
    alike = [one for one in lists if len({type(layer) for layer in one}) == 1]
    if not alike:
        raise PlanError("the model has no stack of layers to go through one by one; leave out --memory")
    return max(alike, key=len)
