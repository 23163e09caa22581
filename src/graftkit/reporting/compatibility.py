"""Pictures of compatibility: models by data, a model's modules, the score by the number of samples, pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from graftkit.improving.ranking import Ranking
from graftkit.measuring.compatibility import Compatibility, Fit
from graftkit.reporting import plots


def pictures(found: Compatibility) -> dict[str, str]:
    """The pictures of a report, by file name."""
    made = {"scores.svg": score_map(found), "samples.svg": sample_curves(found.fits)}
    made |= {f"modules-{n}.svg": module_map(fit) for n, fit in enumerate(found.fits, 1)}
    return {name: plots.standalone(svg) for name, svg in made.items()}


def of_ranking(ranking: Ranking) -> dict[str, str]:
    """The pictures of a ranking, by file name: its pairs, and those of its experts' compatibility."""
    return {"pairs.svg": plots.standalone(pair_map(ranking)), **pictures(ranking.compatibility)}


def score_map(found: Compatibility) -> str:
    """Models and pairs by data sets."""
    rows = [[found.fit(model, data).normalised.value for data in found.data] for model in found.models]
    names = list(found.models)
    for pair in dict.fromkeys(pair.models for pair in found.pairs):
        rows.append([found.pair(*pair, data).normalised.value for data in found.data])
        names.append(" + ".join(pair))
    return plots.heat_map(rows, names, found.data, label="compatibility", title="compatibility of models and pairs")


def module_map(fit: Fit) -> str:
    """One model on one data set: its modules' normalised sensitivities, layers by projections."""
    kinds = list(dict.fromkeys(module.name.rpartition(".")[2] for module in fit.modules))
    layers = sorted({module.layer for module in fit.modules if module.layer is not None})
    cells = [[math.nan] * len(kinds) for _ in layers]
    for module in fit.modules:
        if module.layer is not None:
            cells[layers.index(module.layer)][kinds.index(module.name.rpartition(".")[2])] = module.normalised
    title = f"{fit.model} on {fit.data}: sensitivity of modules"
    return plots.heat_map(cells, list(map(str, layers)), kinds, label="sensitivity (13)", title=title)


def pair_map(ranking: Ranking) -> str:
    """Experts by experts: what the ranking orders pairs by."""
    names = [expert.name for expert in ranking.experts]
    cells = [[math.nan] * len(names) for _ in names]
    for pair in ranking.pairs:
        one, other = (names.index(name) for name in pair.models)
        value = pair.values[ranking.by]
        cells[one][other] = cells[other][one] = math.nan if value is None else value
    return plots.heat_map(cells, names, names, label=ranking.by.replace("_", " "), title="pairs of experts")


def sample_curves(fits: Sequence[Fit]) -> str:
    """The normalised score by the number of samples, its 95% interval shaded; one line a model and data set."""
    lines = {
        f"{fit.model} on {fit.data}": [(spread.samples, spread.normalised) for spread in fit.by_samples] for fit in fits
    }
    title = "compatibility by the number of samples"
    return plots.band_plot(lines, xlabel="samples", ylabel="compatibility, normalised", title=title)
