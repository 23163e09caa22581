"""The adapter that best explains a fine-tuned model: the merge of one model into an adapter, as one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graftkit.errors import RecipeError
from graftkit.execution.local import merge
from graftkit.recipes.recipe import Recipe, load


def recipe_of(
    base: str | Path,
    tuned: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    outside: str = "save",
    dtype: str = "float32",
) -> Recipe:
    """The recipe that extracts an adapter. Raises RecipeError unless either a rank or a share of energy is given."""
    if (rank is None) == (energy is None):
        raise RecipeError("an extraction needs either a rank, such as 16, or a share of the energy, such as 0.9")
    wanted: Any = rank if rank is not None else {"energy": energy}
    output = {"as": "adapter", "rank": wanted, "outside": outside, "dtype": dtype}
    return load({"method": "task_arithmetic", "base": str(base), "models": [str(tuned)], "output": output})


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    outside: str = "save",
    dtype: str = "float32",
    **options: Any,
) -> dict[str, Any]:
    """Writes the adapter of `base` that comes nearest to `tuned`, and returns its record.

    Of each matrix the best `rank` directions are kept, or the fewest that hold the share `energy` of the change's
    squared norm, found by subspace iteration; the record says for each what is left out, which is measured. `outside`:
    what LoRA does not reach (norms, embeddings, biases) is saved whole where it changes (`save`), left as in the base
    (`drop`) or refused. `options` are those of `merge`.
    """
    recipe = recipe_of(base, tuned, rank=rank, energy=energy, outside=outside, dtype=dtype)
    return merge(recipe, out, **options)
