"""Sections of a recipe: `slices:` (the output's depth), `output.tokenizer` (its words), and sizes in bytes."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


def parse_size(text: str) -> int:
    """Bytes of `"5GB"`, `"512MiB"` or `"1000"`. Raises ValueError for anything else or for nothing."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    if not match or match[2] not in SIZES or float(match[1]) <= 0:
        raise ValueError(f"a size is a number and B, KB, MB, GB, KiB, MiB or GiB, such as 5GB; got {text!r}")
    size = float(match[1]) * SIZES[match[2]]
    if size > 2**63:
        raise ValueError(f"a size is at most 8 EiB; got {text[:40]!r}")
    return int(size)


def _range(value: list[int]) -> list[int]:
    if len(value) != 2 or not 0 <= value[0] < value[1]:
        raise ValueError(f"a layer range is [first, one after the last], such as [0, 12]; got {value}")
    return value


class SliceSource(BaseModel):
    """Layers `[a, b)` of one model, and the values of its per-model knobs."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    model: str = Field(min_length=1)
    layer_range: list[int]

    @field_validator("layer_range")
    @classmethod
    def _sound(cls, value: list[int]) -> list[int]:
        return _range(value)

    @property
    def knobs(self) -> dict[str, Any]:
        """The values that stand beside the model."""
        return dict(self.model_extra or {})


class SliceBase(BaseModel):
    """The base of a slice, where it is not the recipe's, or at other layers than the sources'."""

    model_config = STRICT
    model: str | None = None
    layer_range: list[int] | None = None

    @field_validator("layer_range")
    @classmethod
    def _sound(cls, value: list[int] | None) -> list[int] | None:
        return value if value is None else _range(value)


class Slice(BaseModel):
    """Some layers of the output, and the layers that they are made from."""

    model_config = STRICT
    sources: list[SliceSource] = Field(min_length=1)
    base: SliceBase = Field(default_factory=SliceBase)
    method: str | None = None
    knobs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _of_one_length(self) -> Slice:
        ranges = [source.layer_range for source in self.sources]
        ranges += [self.base.layer_range] if self.base.layer_range else []
        if len({stop - start for start, stop in ranges}) > 1:
            raise ValueError(f"the layer ranges of a slice are of one length; got {', '.join(map(str, ranges))}")
        return self

    @property
    def depth(self) -> int:
        """How many layers it has."""
        start, stop = self.sources[0].layer_range
        return stop - start


class TokenRow(BaseModel):
    """Where the row of a token comes from: a model's row of the same or of another token, or zeros."""

    model_config = STRICT
    model: str | None = None
    token: str | None = None
    id: int | None = Field(None, ge=0)
    zero: bool = False
    force: bool = False

    @model_validator(mode="after")
    def _one_origin(self) -> TokenRow:
        if self.zero == (self.model is not None):
            raise ValueError(
                "names a row by `model:` (with `token:` or `id:` if it is another token's), or `zero: true`"
            )
        if (self.token is not None) + (self.id is not None) + self.zero > 1:
            raise ValueError("names its row twice; give one of token, id and zero")
        return self


class Tokenizer(BaseModel):
    """The output's vocabulary: whose tokens and ids, and what a model without a token has to say in its row."""

    model_config = STRICT
    source: str = "base"
    missing: Literal["skip", "fill"] = "skip"
    tokens: dict[str, TokenRow] = Field(default_factory=dict)
    pad_to_multiple_of: int | None = Field(None, ge=1, le=1 << 20)
    padding: Literal["keep", "mean"] = "keep"

    @field_validator("tokens", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """A row may be given as a model's bare name."""
        return {k: {"model": v} if isinstance(v, str) else v for k, v in value.items()} if _is_map(value) else value


def _is_map(value: Any) -> bool:
    return isinstance(value, dict)
