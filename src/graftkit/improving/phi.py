"""The gate networks: from how far the models are apart in a channel to the gates that it is shared out by.

A gate is `l = softmax_t(log start_t + phi_t(d_t))` over the models t. For two models the second's phi is 0, so that
`l_1 = sigmoid(phi(d))` is the paper's w_local. Every phi begins as 0: training starts from equal gates, or from a
file's. d is standardised within each matrix unless asked otherwise: its raw sums saturate the sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftkit.measuring.fused import block_sums
from graftkit.measuring.responses import Delta
from graftkit.methods.graft import graft_weights

Kind = Literal["affine", "channelwise", "mlp", "dense", "direct"]
KINDS: tuple[Kind, ...] = ("affine", "channelwise", "mlp", "dense", "direct")
HIDDEN = 16  # of the shared network
LEAST = 1e-6  # a gate that a training starts from is at least so large: a softmax never reaches 0


def distances(deltas: Sequence[Delta], shape: Sequence[int], size: int = 0) -> Tensor:
    """How far each model is from the mean of the others, summed over each channel, or each block of `size`.

    [models, out] or [models, out/size, in/size], float32; for two models `sum |W_b - W_g|` (equation 1), twice.
    """
    whole = [delta for delta in deltas if delta.right is not None]
    like = whole[0].right if whole else torch.zeros(0)
    assert like is not None
    stack = torch.zeros((len(deltas), *shape), dtype=like.dtype, device=like.device)
    for t, delta in enumerate(deltas):
        if delta.right is not None:
            stack[t] = delta.right if delta.left is None else delta.left @ delta.right
    apart = (stack - (stack.sum(dim=0) - stack) / max(len(stack) - 1, 1)).abs()
    return torch.stack([block_sums(one, size) for one in apart]) if size else apart.sum(dim=2)


def standardised(found: Tensor) -> Tensor:
    """Less their mean, over their deviation, model by model; zeros where all are alike."""
    flat = found.reshape(len(found), -1)
    spread = flat.std(dim=1, correction=0, keepdim=True)
    centred = flat - flat.mean(dim=1, keepdim=True)
    return torch.where(spread > 0, centred / spread.clamp_min(1e-30), 0 * centred).reshape(found.shape)


class Phi(nn.Module):
    """A learnable function of d for each matrix, by name: [heads, *grid] -> [heads, *grid], 0 before any training.

    `affine`: a scale and a shift for each matrix and head; `channelwise`: for each channel (or block); `mlp`: one
    network of one hidden layer for all matrices, applied to each d_i, with an output for each head; `dense`: a linear
    map over all channels of a matrix; `direct`: a number for each channel, which d does not enter.
    """

    def __init__(self, kind: Kind, features: Mapping[str, Tensor], seed: int = 0) -> None:
        super().__init__()
        self.kind = kind
        self.place = {name: k for k, name in enumerate(features)}
        self.features = dict(features)
        own = [self._parameters_of(found) for found in features.values()]
        self.scales = nn.ParameterList([scale for scale, _ in own])
        self.shifts = nn.ParameterList([shift for _, shift in own])
        if kind == "mlp":
            first = next(iter(features.values()))
            self.scales, self.shifts = nn.ParameterList(), nn.ParameterList()
            draw = torch.Generator().manual_seed(seed)
            inner = torch.empty(HIDDEN, 2).uniform_(-1, 1, generator=draw).to(first)
            self.inner = nn.Parameter(inner)  # weight and bias of the hidden layer
            self.outer = nn.Parameter(inner.new_zeros(len(first), HIDDEN + 1))

    def _parameters_of(self, found: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
        heads, grid = len(found), found.shape[1:]
        wide = {"channelwise": grid, "direct": grid, "dense": (*grid, *grid)}.get(self.kind, ())
        high = grid if self.kind in ("channelwise", "direct", "dense") else ()
        scale = found.new_zeros((heads, *wide)) if self.kind != "direct" else found.new_zeros(0)
        return nn.Parameter(scale), nn.Parameter(found.new_zeros((heads, *high)))

    def forward(self, name: str) -> Tensor:
        """phi(d) of one matrix."""
        found = self.features[name]
        if self.kind == "mlp":
            hidden = torch.tanh(found[..., None] * self.inner[:, 0] + self.inner[:, 1])  # [heads, *grid, hidden]
            weights = self.outer.reshape(len(found), *[1] * (found.ndim - 1), HIDDEN + 1)
            return (hidden * weights[..., :-1]).sum(dim=-1) + weights[..., -1]
        scale, shift = self.scales[self.place[name]], self.shifts[self.place[name]]
        if self.kind == "direct":
            return shift
        if self.kind == "dense":
            return torch.einsum("hij,hj->hi", scale, found) + shift
        if self.kind == "affine":
            scale, shift = (value.reshape(len(found), *[1] * (found.ndim - 1)) for value in (scale, shift))
        return scale * found + shift

    @property
    def size(self) -> int:
        """How many numbers are learnt."""
        return sum(parameter.numel() for parameter in self.parameters())


@dataclass(frozen=True)
class Matrix:
    """What is fixed of a matrix while its gates are learnt: method, knobs, signals [models], and where gates start."""

    method: str
    knobs: Mapping[str, Any]
    signals: Tensor
    start: Tensor  # [models, *grid]: gates or weights that sum to one, or coefficients


class Gating(nn.Module):
    """From what is learnt to the coefficients by which a live model fuses: the same formula as the merge's.

    `kind` is that of the file of gates: `local`, `weight` or `coefficient`. With `sharpness` that knob is learnt too.
    """

    def __init__(self, phi: Phi, matrices: Mapping[str, Matrix], kind: str, sharpness: float | None = None) -> None:
        super().__init__()
        self.phi, self.matrices, self.kind = phi, dict(matrices), kind
        self.log_sharpness = None
        if sharpness is not None:
            first = next(iter(self.matrices.values())).start
            self.log_sharpness = nn.Parameter(first.new_tensor(math.log(sharpness)))

    @property
    def sharpness(self) -> float | None:
        """The learnt sharpness, None where it is not learnt."""
        return None if self.log_sharpness is None else float(self.log_sharpness.detach().exp())

    def gates(self, name: str) -> Tensor:
        """What the file of gates holds of a matrix: [models, *grid]."""
        own, start = self.phi(name), self.matrices[name].start
        if self.kind == "coefficient":
            return start + own
        logits = start.clamp_min(LEAST).log()
        more = functional.pad(own, [0, 0] * (own.ndim - 1) + [0, len(start) - len(own)])  # the second of two: 0
        return torch.softmax(logits + more, dim=0)

    def forward(self, name: str) -> Tensor:
        """The coefficient of each model's delta: [models, *grid]."""
        gates, matrix = self.gates(name), self.matrices[name]
        if self.kind == "coefficient":
            return gates * matrix.knobs["scale"]
        if matrix.method != "graft":
            return gates
        knobs = {key: matrix.knobs[key] for key in ("a", "c", "normaliser", "sharpness")}
        if self.log_sharpness is not None:
            knobs["sharpness"] = self.log_sharpness.exp()
        return graft_weights(matrix.signals.to(gates), gates, **knobs)  # type: ignore[no-any-return]


def heads_of(kind: str, models: int) -> int:
    """How many phi a matrix has: one for two models that share a channel, else one for each model."""
    return 1 if models == 2 and kind != "coefficient" else models
