"""Items with images: what a VLM's processor makes of a prompt with `<image>` in it, and how several fill one batch.

Where a tokenizer is asked for, a VLM's processor may stand: it holds a tokenizer. Images are read when a batch is made,
and again where a row is computed again: what is held between is token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.errors import DataError, missing_extra

if TYPE_CHECKING:
    from torch import Tensor

MARK = "<image>"
"""Where an image belongs in a text."""

_IDS = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Media:
    """The images of one prompt: `first` is the place of the first token that stands for one, `shapes` are those of what
    a processor makes of them, but for the first dimension (-1 for what goes along with the tokens)."""

    processor: Any
    text: str
    files: tuple[Path, ...]
    first: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def movable(self) -> bool:
        """Whether nothing goes along with the tokens, so that their places do not matter."""
        return all(shape[:1] != (-1,) for _, shape in self.shapes)

    def tensors(self) -> dict[str, Tensor]:
        """What the model gets beside token ids: `pixel_values` and, by family, sizes, grids or kinds of tokens."""
        return {name: value for name, value in _processed(self.processor, self.text, self.files).items()
                if name not in _IDS}  # fmt: skip


def tokenizer_of(reader: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer that it is."""
    return getattr(reader, "tokenizer", reader)


def takes_images(reader: Any) -> bool:
    """Whether it is a processor with images."""
    return getattr(reader, "image_processor", None) is not None


def prompt_with_images(reader: Any, text: str, files: Sequence[Path], where: str) -> tuple[tuple[int, ...], Media]:
    """Token ids of a text as the processor takes it, with as many places for images as it wants.

    Raises DataError, with `where`, for a file that is absent or no image, and for a model that takes none; GraftError
    where Pillow is not installed.
    """
    if find_spec("PIL") is None:
        raise missing_extra("images", "pillow")
    if not takes_images(reader):
        raise DataError(f"{where}: it has images, but this model reads text only; give a vision-language model")
    for file in files:
        if not file.is_file():
            raise DataError(f"{where}: the image {file} does not exist (paths are relative to the data file)")
    try:
        made = _processed(reader, text, tuple(files))
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: the processor refuses {', '.join(map(str, files))}: {error}") from error
    ids = tuple(made["input_ids"][0].tolist())
    shapes = tuple((name, _fixed(value, len(ids))) for name, value in sorted(made.items()) if name not in _IDS)
    token = getattr(reader, "image_token_id", None)
    first = ids.index(token) if token in ids else 0
    return ids, Media(reader, text, tuple(files), first, shapes)


def inputs_of(
    media: Sequence[Sequence[Media]], lengths: Sequence[int], longest: int, left: bool = False
) -> dict[str, Tensor]:
    """What a batch's model gets beside ids and mask: images one after the other, row by row (`media` has each row's).

    What goes along with the tokens is carried on from a prompt's last token over its answer, up to the row's length,
    then padded with zeros on the right, or on the left.
    """
    import torch

    made: dict[str, list[Tensor]] = {}
    for own, length in zip(media, lengths, strict=True):
        for one in own:
            along = {name for name, shape in one.shapes if shape[:1] == (-1,)}
            for name, value in one.tensors().items():
                made.setdefault(name, []).append(_padded(value, length, longest, left) if name in along else value)
    return {name: torch.cat(values) for name, values in made.items()}


def rendered(reader: Any, messages: Sequence[dict[str, str]], *, answer: bool) -> str:
    """A conversation in the model's own chat template; `answer`: up to where the assistant begins.

    With a processor, texts are given in parts, images between them; to a template that knows texts only, as texts.
    """
    plain = [dict(message) for message in messages]
    if not takes_images(reader):
        return str(reader.apply_chat_template(plain, add_generation_prompt=answer, tokenize=False))
    template = _template(reader)
    made = reader.apply_chat_template(
        [{"role": one["role"], "content": _parts(one["content"])} for one in plain],
        chat_template=template, add_generation_prompt=answer, tokenize=False,
    )  # fmt: skip
    texts = [part["text"] for one in plain for part in _parts(one["content"]) if part["type"] == "text"]
    if all(text.strip() in made for text in texts) and "'type':" not in made:
        return str(made)
    plain = [{**one, "content": with_tokens(reader, one["content"])} for one in plain]
    return str(reader.apply_chat_template(
        plain, chat_template=template, add_generation_prompt=answer, tokenize=False))  # fmt: skip


def has_template(reader: Any) -> bool:
    """Whether there is a chat template."""
    return bool(_template(reader))


def with_tokens(reader: Any, text: str) -> str:
    """A text with the token in it that the processor puts images for."""
    token = getattr(reader, "boi_token", None) or getattr(reader, "image_token", MARK)
    return text.replace(MARK, str(token))


def _template(reader: Any) -> Any:
    return getattr(reader, "chat_template", None) or getattr(tokenizer_of(reader), "chat_template", None)


def _parts(text: str) -> list[dict[str, str]]:
    pieces = text.split(MARK)
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def _opened(file: Path) -> Any:
    from PIL import Image

    with Image.open(file) as image:
        return image.convert("RGB")


def _processed(processor: Any, text: str, files: Sequence[Path]) -> dict[str, Tensor]:
    made = processor(text=text, images=[_opened(file) for file in files], add_special_tokens=False, return_tensors="pt")
    return dict(made)


def _fixed(value: Tensor, tokens: int) -> tuple[int, ...]:
    """A shape without its first dimension; -1 where it goes along with the tokens."""
    if value.dim() > 1 and tuple(value.shape[:2]) == (1, tokens):
        return (-1, *value.shape[2:])
    return tuple(value.shape[1:])


def _padded(value: Tensor, length: int, longest: int, left: bool) -> Tensor:
    import torch

    carried = value[:, -1:].expand(-1, length - value.shape[1], *value.shape[2:])
    empty = torch.zeros((1, longest - length, *value.shape[2:]), dtype=value.dtype)
    return torch.cat([empty, value, carried] if left else [value, carried, empty], dim=1)
