"""Recipes that are written elsewhere than they stood: paths that still lead to their models."""

from __future__ import annotations

from pathlib import Path

from graftkit.recipes.recipe import Recipe


def moved(recipe: Recipe, directory: Path) -> Recipe:
    """The recipe as it is to be written into a directory; hub ids stay as they are."""
    if recipe.directory.resolve() == directory.absolute().resolve():
        return recipe

    def placed(name: str) -> str:
        path = recipe.directory / name.partition("#")[0]
        return str((recipe.directory / name).absolute()) if path.exists() else name

    models = [entry.model_copy(update={"model": placed(entry.model)}) for entry in recipe.models]
    like = recipe.output.like
    output = recipe.output.model_copy(update={"like": like if like in (None, "base") else placed(like)})
    base = None if recipe.base is None else placed(recipe.base)
    return recipe.model_copy(update={"models": models, "base": base, "output": output})
