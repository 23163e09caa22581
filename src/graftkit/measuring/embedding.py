"""Texts as unit vectors: a static embedder that works offline, or any model of sentence-transformers by name."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from graftkit.errors import CheckpointError, DataError, missing_extra

if TYPE_CHECKING:
    from tokenizers import Tokenizer

STATIC = "wordllama"
CHARACTERS = 4096  # of a text that are looked at
_BATCH = 512  # texts at once
_FILES = ("tokenizers/l2_supercat_tokenizer_config.json", "weights/l2_supercat_256.safetensors")


class Embedder(Protocol):
    """Something that makes vectors of texts."""

    @property
    def name(self) -> str:
        """What it is asked for by."""

    @property
    def version(self) -> str:
        """Of the package that it comes from."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its files, where they are known."""

    def vectors(self, texts: list[str]) -> np.ndarray:
        """Float32 `[texts, dimensions]`, each of length 1 (0 for a text without tokens)."""


@dataclass(frozen=True)
class StaticEmbedder:
    """The mean of the token vectors that the package wordllama ships (32000 x 256, MIT), read without the package.

    About a hundred times faster than a small transformer on a CPU. Its vocabulary is Llama 2's and it was trained on
    English: other languages are told from each other, their topics hardly. Order and negation are not seen.
    """

    tokenizer: Tokenizer
    weights: np.ndarray  # [tokens, dimensions], float32
    fingerprint: str
    version: str
    name: str = STATIC

    def vectors(self, texts: list[str]) -> np.ndarray:
        """See `Embedder`."""
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        lengths = np.array([len(one) for one in encoded])
        sums = np.zeros((len(texts), self.weights.shape[1]), np.float32)
        if lengths.any():
            ids = np.concatenate([one.ids for one in encoded]).astype(np.int64)
            starts = np.cumsum(lengths) - lengths
            sums[lengths > 0] = np.add.reduceat(self.weights[ids], starts[lengths > 0], axis=0)
        return _unit(sums)


@dataclass(frozen=True)
class SentenceEmbedder:
    """A model of sentence-transformers."""

    model: Any
    name: str
    version: str
    fingerprint: str = ""

    def vectors(self, texts: list[str]) -> np.ndarray:
        """See `Embedder`."""
        return _unit(np.asarray(self.model.encode(texts, show_progress_bar=False), np.float32))


def embedder(name: str = STATIC) -> Embedder:
    """The embedder of a name: `wordllama`, else a path or hub id for sentence-transformers.

    Raises GraftError where its extra is not installed, CheckpointError where its weights do not load.
    """
    return _static() if name == STATIC else _sentences(name)


def embedded(texts: Iterable[str], by: Embedder) -> Iterator[np.ndarray]:
    """The vectors of texts in batches, as float16 `[batch, dimensions]`; a text counts to 4096 characters."""
    stream = (text[:CHARACTERS].encode(errors="replace").decode() for text in texts)  # halves of surrogate pairs
    while batch := list(islice(stream, _BATCH)):
        yield by.vectors(batch).astype(np.float16)


def _static() -> StaticEmbedder:
    from importlib.metadata import version

    spec = importlib.util.find_spec("wordllama")  # found, not imported: loading it asks the hub for its tokenizer
    if spec is None or not spec.submodule_search_locations:
        raise missing_extra("data", "wordllama")
    from safetensors import SafetensorError
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    words, weights = (Path(next(iter(spec.submodule_search_locations))) / file for file in _FILES)
    try:
        digest = hashlib.sha256(words.read_bytes() + weights.read_bytes()).hexdigest()
        matrix = load_file(weights)["embedding.weight"].astype(np.float32)
        tokenizer = Tokenizer.from_file(str(words))
    except (OSError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{weights}: cannot be read ({error}); install wordllama 0.4 anew") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return StaticEmbedder(tokenizer, matrix, digest, version("wordllama"))


def _sentences(name: str) -> SentenceEmbedder:
    try:
        import sentence_transformers
    except ImportError as error:
        raise missing_extra("embed", "sentence-transformers") from error
    try:
        model = sentence_transformers.SentenceTransformer(name)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"--embedder {name}: sentence-transformers does not load it ({reason:.200})") from error
    return SentenceEmbedder(model, name, sentence_transformers.__version__)


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    scaled: np.ndarray = rows / np.where(norms > 0, norms, 1)
    return scaled
