"""A live model whose linear layers fuse several models as it runs: `y = W x + sum_t c_t (D_t x)`.

W is the live model's own weight, D_t what model t adds to it, c_t its coefficients, one for each output channel or each
block of the matrix. Gradients by the coefficients of channels come from activations: no matrix as large as a weight is
made for them. Coefficients of blocks take the gradient of one fused weight at a time, which is made again on the way
back instead of being kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftkit.measuring.activations import linear_layers
from graftkit.measuring.responses import Delta

Coefficients = Callable[[], Tensor]
"""Gives the coefficients of a matrix: [models, out], or [models, out/size, in/size] for blocks."""


class FusedLinear(nn.Module):
    """A linear layer and the deltas of several models, fused by coefficients that are asked for in each forward pass.

    `size` is that of blocks; 0: coefficients go by channel.
    """

    owner: Tensor

    def __init__(self, plain: nn.Linear, deltas: Sequence[Delta], coefficients: Coefficients, size: int = 0) -> None:
        super().__init__()
        self.plain, self.deltas, self.coefficients, self.size = plain, tuple(deltas), coefficients, size
        kept = [(t, delta) for t, delta in enumerate(deltas) if delta.right is not None]
        self.narrow = not size and all(delta.left is not None for _, delta in kept)
        self.whole, self.ranks = kept, [len(_of(delta.right)) for _, delta in kept]
        if self.narrow and kept:
            self.left: Tensor = torch.cat([_of(delta.left) for _, delta in kept], dim=1)  # [out, ranks]
            self.right: Tensor = torch.cat([_of(delta.right) for _, delta in kept])  # [ranks, in]
            owner = torch.tensor([t for t, _ in kept]).repeat_interleave(torch.tensor(self.ranks))
            self.owner = owner.to(self.left.device)

    def learning(self) -> nn.ParameterList:
        """Lets the factors of its deltas learn, and returns them; none where no model changes the layer."""
        if not self.whole:
            return nn.ParameterList()
        self.left, self.right = nn.Parameter(self.left), nn.Parameter(self.right)
        return nn.ParameterList([self.left, self.right])

    def parted(self) -> list[Delta]:
        """Each model's delta as its factors are now."""
        found = [Delta() for _ in self.deltas]
        if self.whole:
            lefts, rights = self.left.detach().split(self.ranks, dim=1), self.right.detach().split(self.ranks)
            for (t, _), left, right in zip(self.whole, lefts, rights, strict=True):
                found[t] = Delta(left.clone(), right.clone())
        return found

    def forward(self, inputs: Tensor) -> Tensor:
        """The fused layer's outputs, [..., out]."""
        given = self.coefficients().to(inputs.dtype)
        if not self.whole:
            return self.plain(inputs)  # type: ignore[no-any-return]
        if self.narrow:
            factors = self.left * given[self.owner].T  # [out, ranks]: c_t beside each column of B_t
            return self.plain(inputs) + (inputs @ self.right.T) @ factors.T  # type: ignore[no-any-return]
        if self.size:
            flat = (of for _, delta in self.whole for of in (delta.left, delta.right))
            owners, size = tuple(t for t, _ in self.whole), self.size
            weight, bias = self.plain.weight, self.plain.bias
            return _Blocks.apply(inputs, weight, bias, given, size, owners, *flat)  # type: ignore[no-any-return]
        total = self.plain(inputs)
        for t, delta in self.whole:
            total = total + given[t] * _answer(delta, inputs)
        return total  # type: ignore[no-any-return]


def _of(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _answer(delta: Delta, inputs: Tensor) -> Tensor:
    inner = inputs @ _of(delta.right).T
    return inner if delta.left is None else inner @ delta.left.T


class _Blocks(torch.autograd.Function):
    """A linear layer by a weight that is fused block by block, and forgotten once it has been used."""

    @staticmethod
    def forward(  # type: ignore[override]
        context: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        given: Tensor,
        size: int,
        owners: tuple[int, ...],
        *flat: Tensor | None,
    ) -> Tensor:
        context.save_for_backward(inputs, weight, given, *flat)
        context.size, context.owners = size, owners
        return functional.linear(inputs, _fused(weight, given, size, owners, flat), bias)

    @staticmethod
    def backward(context: Any, *arriving: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        inputs, weight, given, *flat = context.saved_tensors
        slope, size, owners = arriving[0], context.size, context.owners
        back = slope @ _fused(weight, given, size, owners, flat) if context.needs_input_grad[0] else None
        of_weight = slope.reshape(-1, slope.shape[-1]).T @ inputs.reshape(-1, inputs.shape[-1])  # [out, in]
        found = torch.zeros_like(given)
        for t, (left, right) in zip(owners, _pairs(flat), strict=True):
            found[t] = block_sums(of_weight * _dense(left, right), size)
        return (back, None, None, found, None, None, *[None] * len(flat))


def _pairs(flat: Sequence[Tensor | None]) -> Iterator[tuple[Tensor | None, Tensor]]:
    for left, right in zip(flat[::2], flat[1::2], strict=True):
        yield left, _of(right)


def _dense(left: Tensor | None, right: Tensor) -> Tensor:
    return right if left is None else left @ right


def _fused(weight: Tensor, given: Tensor, size: int, owners: Sequence[int], flat: Sequence[Tensor | None]) -> Tensor:
    total = weight.detach().clone()
    for t, (left, right) in zip(owners, _pairs(flat), strict=True):
        total += spread(given[t], size, total.shape) * _dense(left, right)
    return total


def spread(blocks: Tensor, size: int, shape: Sequence[int]) -> Tensor:
    """Values of blocks as values of entries: [out/size, in/size] -> [out, in]; the last blocks may be ragged."""
    wide = blocks.repeat_interleave(size, dim=0).repeat_interleave(size, dim=1)
    return wide[: shape[0], : shape[1]]


def block_sums(matrix: Tensor, size: int) -> Tensor:
    """The sum of each block of a matrix: [out, in] -> [out/size, in/size], rounded up."""
    if size == 1:
        return matrix
    padded = functional.pad(matrix, (0, -matrix.shape[1] % size, 0, -matrix.shape[0] % size))
    high, wide = padded.shape[0] // size, padded.shape[1] // size
    return padded.reshape(high, size, wide, size).sum(dim=(1, 3))


@contextmanager
def fused(
    model: Any, deltas: Mapping[str, list[Delta]], coefficients: Callable[[str], Tensor], size: int = 0
) -> Iterator[dict[str, FusedLinear]]:
    """Puts fused layers in the place of a model's linear ones, by the names of their weights, and back afterwards.

    Raises PlanError for a name that is no linear layer's weight.
    """
    layers = linear_layers(
        model, deltas, what="so no gates can be learnt for it; add a rule with another method for it"
    )
    places = {id(child): (parent, own) for parent in model.modules() for own, child in parent.named_children()}
    put, made = [], {}
    try:
        for name, plain in layers.items():
            parent, attribute = places[id(plain)]
            made[name] = FusedLinear(plain, deltas[name], _asking(coefficients, name), size)
            setattr(parent, attribute, made[name])
            put.append((parent, attribute, plain))
        yield made
    finally:
        for parent, attribute, plain in put:
            setattr(parent, attribute, plain)


def _asking(coefficients: Callable[[str], Tensor], name: str) -> Coefficients:
    return lambda: coefficients(name)
