"""The rank of an adapter that a merge writes: `exact`, a number, or the smallest that keeps a share of the energy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

DEFAULT_ENERGY = 0.99


class Energy(BaseModel):
    """The share of a delta's squared norm that its factors keep."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    energy: float = Field(gt=0, le=1)


Rank = Literal["exact"] | Annotated[int, Field(ge=1)] | Energy
Outside = Literal["save", "drop", "refuse"]
"""What happens to deltas that no factors can hold (norms, embeddings): whole tensors, nothing, or a refusal."""


def checked(value: object) -> object:
    """A rank as a recipe gives it. Raises ValueError for anything else, in one sentence for all its forms."""
    share = value.get("energy") if isinstance(value, dict) and set(value) == {"energy"} else None
    number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    sound = isinstance(share, (int, float)) and not isinstance(share, bool) and 0 < share <= 1
    if not (value is None or value == "exact" or number or sound or isinstance(value, Energy)):
        raise ValueError(f"got {value!r}, expected `exact`, a whole number such as 16, or {{energy: 0.99}}")
    return {"energy": float(share)} if isinstance(share, (int, float)) else value
