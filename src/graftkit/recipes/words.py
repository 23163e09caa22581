"""The tokens of a model, read from its files as plain JSON; and the files of a vocabulary to which tokens are added."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftkit.checkpoints.sources import read_json
from graftkit.errors import CheckpointError, PlanError

TOKENIZER = "tokenizer.json"
FILES = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json", "tekken.json",
)  # fmt: skip
"""The files that say what a model's tokens are and how text and chats become tokens."""

OUTDATED = ("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
            "sentencepiece.bpe.model", "tekken.json")  # fmt: skip
"""Those that a vocabulary with more tokens leaves out, since only tokenizer.json is written anew."""

PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


@dataclass(frozen=True)
class Words:
    """A vocabulary: tokens by their string, and of those that text is searched for before anything else, the entry."""

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    kind: str = "listed"  # `scored`: a Unigram model's; `foreign`: of another library than tokenizers

    @property
    def stop(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1


def read_words(directory: Path, label: str) -> Words | None:
    """The vocabulary that a directory holds; None where it holds none.

    Raises CheckpointError for one that cannot be read, and PlanError for two tokens of one id.
    """
    if (directory / TOKENIZER).is_file():
        words = _from_json(directory / TOKENIZER)
    elif any((directory / name).is_file() for name in FILES if name in OUTDATED):
        words = _from_transformers(directory)
    else:
        return None
    if len(set(words.ids.values())) < len(words.ids):
        seen: dict[int, str] = {}
        one, two = next((seen[n], t) for t, n in words.ids.items() if seen.setdefault(n, t) != t)
        raise PlanError(f"{label}: its tokenizer gives {one!r} and {two!r} the same id {words.ids[two]}")
    if not words.ids:
        raise PlanError(f"{label}: its tokenizer has no token")
    return words


def _from_json(file: Path) -> Words:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = data["model"]["vocab"]
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((v[0], k) for k, v in enumerate(vocabulary))
        ids = {str(token): int(number) for token, number in pairs}
        added = {str(entry["content"]): entry for entry in data.get("added_tokens") or []}
        ids |= {token: int(entry["id"]) for token, entry in added.items()}
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a tokenizer as the tokenizers library writes it ({error!r})") from error
    if min(ids.values(), default=0) < 0:
        raise CheckpointError(f"{file}: a token has a negative id")
    return Words(ids, added, "listed" if isinstance(vocabulary, dict) else "scored")


def _from_transformers(directory: Path) -> Words:
    """A tokenizer of another kind, through the library that knows it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        ids = {str(token): int(number) for token, number in tokenizer.get_vocab().items()}
        added = {
            str(entry.content): {**PLAIN, "content": str(entry.content), "special": bool(entry.special)}
            for entry in tokenizer.added_tokens_decoder.values()
        }
    except Exception as error:  # whatever a tokenizer's own code raises, the directory is not readable
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise CheckpointError(
            f"{directory}: its tokenizer cannot be read ({reason[:200]}); save it as {TOKENIZER}"
        ) from error
    return Words(ids, added, "foreign")


def union(parts: Sequence[tuple[Words, int]]) -> Words:
    """The first vocabulary, then what the others have and it has not: ordinary tokens, then added ones.

    Each part is a vocabulary and how many rows its model's embedding has: a token without a row is nobody's.
    """
    first, _ = parts[0]
    ids, added = dict(first.ids), dict(first.added)
    stop = first.stop
    for special in (False, True):
        for words, rows in parts[1:]:
            for token, number in sorted(words.ids.items(), key=lambda item: item[1]):
                if (token in words.added) == special and token not in ids and number < rows:
                    ids[token], stop = stop, stop + 1
                    if special:
                        added[token] = {**words.added[token], "id": ids[token]}
    return Words(ids, added, first.kind)


def extended(words: Words, tokens: Sequence[str], known: Sequence[Words]) -> Words:
    """The vocabulary with some tokens added, as other vocabularies that have them as added tokens describe them."""
    ids, added = dict(words.ids), dict(words.added)
    stop = words.stop
    for token in tokens:
        if token not in ids:
            entry = next((other.added[token] for other in known if token in other.added), PLAIN)
            ids[token], stop = stop, stop + 1
            added[token] = {**entry, "content": token, "id": ids[token]}
    return Words(ids, added, words.kind)


def write(directory: Path, words: Words, label: str) -> dict[str, bytes]:
    """The tokenizer files of a directory, with the tokens that its vocabulary lacks added to them."""
    own = {name: (directory / name).read_bytes() for name in FILES if (directory / name).is_file()}
    held = read_words(directory, label)
    if held and held.ids == words.ids:
        return own
    if held:
        check_extensible(words, held, label)
    data = read_json(directory / TOKENIZER)
    data["added_tokens"] = sorted(words.added.values(), key=lambda entry: entry["id"])
    vocabulary = data["model"]["vocab"]
    if isinstance(vocabulary, dict):  # an id stands fast only where the model's own vocabulary has it
        data["model"]["vocab"] = dict(sorted({**vocabulary, **words.ids}.items(), key=lambda item: item[1]))
    kept = {name: content for name, content in own.items() if name not in OUTDATED}
    return {**kept, TOKENIZER: (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()}


def check_extensible(words: Words, held: Words, label: str) -> None:
    """Refuses tokens that the files of a vocabulary could not take: a list of scored pieces takes added tokens only."""
    if words.ids == held.ids:
        return
    if held.kind == "foreign":
        raise PlanError(f"{label}: has no {TOKENIZER}, to which tokens could be added; save its tokenizer as one")
    pieces = [token for token in words.ids if token not in words.added and token not in held.ids]
    if held.kind == "scored" and pieces:
        raise PlanError(
            f"{label}: its tokenizer is a Unigram model, to which {len(pieces)} ordinary tokens ({pieces[0]!r} first) "
            "cannot be added without scores; choose `tokenizer: base`"
        )
