"""Random numbers that depend on what they are for, and on nothing else.

`uniform` number i of a stream is a pure function of the stream's key and of i (Philox4x32-10; Salmon, Moraes, Dror and
Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Keys come from the recipe's seed, the model's content,
how often that model occurred before, and the tensor's name: blocks, shards, threads and the order of models do not
matter, two tensors never share a mask, and a model listed twice gets two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MASK = 0xFFFFFFFF


def key_of(seed: int, model: str, occurrence: int, tensor: str) -> int:
    """The 64-bit key of one model's stream for one tensor; `model` is the content's fingerprint."""
    text = "\x00".join((str(seed), model, str(occurrence), tensor))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def derived(key: int, number: int) -> int:
    """The key of the `number`-th stream beside a stream; the 0th is the stream itself."""
    text = key.to_bytes(8, "little") + number.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") if number else key


@dataclass(frozen=True)
class Keyed:
    """The random numbers of one tensor, or of the block of it that starts at flat element `start`.

    `keys`: one per model. In a notebook: `Keyed.of(seed=0, models=2)`.
    """

    keys: tuple[int, ...]
    start: int = 0

    @classmethod
    def of(cls, *, seed: int, models: int, tensor: str = "") -> Keyed:
        """Streams for models that have no content to name them by."""
        return cls(tuple(key_of(seed, "", k, tensor) for k in range(models)))

    def derived(self, number: int) -> Keyed:
        """Streams for the `number`-th of several that draw for one tensor; the 0th has these streams themselves."""
        return Keyed(tuple(derived(key, number) for key in self.keys), self.start)

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform numbers in [0, 1), multiples of 2^-32, float64, in the shape of `like` [models, *shape]."""
        import torch

        count = like[0].numel()
        made = compiled_uniform if like.device.type == "cpu" else philox_uniform
        rows = [made(key, self.start, count, like.device) for key in self.keys]
        return torch.stack(rows).reshape(like.shape)


def philox_uniform(key: int, start: int, count: int, device: object = "cpu") -> Tensor:
    """Numbers `start` to `start + count` of a stream, [count] in [0, 1), float64; the compiled twin's reference."""
    import torch

    index = torch.arange(start // 4, -(-(start + count) // 4), dtype=torch.int64, device=device)  # type: ignore[call-overload]
    words = philox((index & MASK, index >> 32, torch.zeros_like(index), torch.zeros_like(index)), key)
    flat = torch.stack(words, dim=1).reshape(-1)[start % 4 : start % 4 + count]
    return flat.to(torch.float64) * 2.0**-32


def compiled_uniform(key: int, start: int, count: int, device: object = "cpu") -> Tensor:
    """As `philox_uniform`, by the compiled twin."""
    import torch

    from graftkit.methods.kernels import random_words

    return torch.from_numpy(random_words(key, start, count) * 2.0**-32)


def philox(counter: Sequence[Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four 32-bit counter words (as int64 tensors) to four random 32-bit words, under a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & MASK, key >> 32
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, in int64 arithmetic that must not overflow its sign."""
    low_part, high_part = constant & 0xFFFF, constant >> 16
    first = word * low_part
    second = word * high_part + (first >> 16)
    return second >> 16, ((second & 0xFFFF) << 16) | (first & 0xFFFF)
