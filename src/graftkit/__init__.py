"""graftkit: merge language models, vision-language models and LoRA adapters by their weights.

The verbs of the program `graft` are functions here: `merge(recipe, out)`, `plan(recipe)`, `evaluate(models, tasks)`.
Names are looked up when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftkit.errors import GraftError as GraftError
    from graftkit.execution.extraction import extract as extract
    from graftkit.execution.local import execute as execute
    from graftkit.execution.local import merge as merge
    from graftkit.improving.ranking import rank as rank
    from graftkit.improving.search import search as search
    from graftkit.improving.subsample import subsample as subsample
    from graftkit.measuring.compatibility import compatibility as compatibility
    from graftkit.measuring.evaluation import evaluate as evaluate
    from graftkit.measuring.inspection import inspect as inspect
    from graftkit.methods import method as method
    from graftkit.recipes.plan import Plan as Plan
    from graftkit.recipes.plan import plan as plan
    from graftkit.recipes.recipe import Recipe as Recipe

__version__ = "0.1.0"

_PLACES = {
    "GraftError": "graftkit.errors",
    "Plan": "graftkit.recipes.plan",
    "Recipe": "graftkit.recipes.recipe",
    "compatibility": "graftkit.measuring.compatibility",
    "evaluate": "graftkit.measuring.evaluation",
    "execute": "graftkit.execution.local",
    "extract": "graftkit.execution.extraction",
    "inspect": "graftkit.measuring.inspection",
    "merge": "graftkit.execution.local",
    "method": "graftkit.methods",
    "plan": "graftkit.recipes.plan",
    "search": "graftkit.improving.search",
    "rank": "graftkit.improving.ranking",
    "subsample": "graftkit.improving.subsample",
}

__all__ = [
    "GraftError",
    "Plan",
    "Recipe",
    "compatibility",
    "evaluate",
    "execute",
    "extract",
    "inspect",
    "merge",
    "method",
    "plan",
    "rank",
    "search",
    "subsample",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'graftkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
