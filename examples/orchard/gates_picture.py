"""The picture of the gates' experiment: what a merge keeps against the size of what it was told of the examples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gates_scores import interval, kept

PICTURE = "experiment-graft.svg"
NOTHING = 0.03  # megabytes: where rows stand that are told nothing
COLOURS = {"core": "#c0392b", "graft": "#2471a3", "RegM": "#1e8449"}


def size_of(found: Mapping[str, Any]) -> float:
    """Megabytes of a row's statistic or gates."""
    return float(found.get("statistics", {}).get("bytes", found.get("bytes", 0))) / 1e6


def write_picture(held: Mapping[str, Any], place: Path) -> None:
    """Draws every merge of a scenario as a point with its interval, the number of examples beside its name."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "graftkit"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6.5))
    rows = [name for name in held["rows"] if name != "base" and not name.startswith("expert ")]
    placed: list[tuple[float, float]] = []
    worse = [name for name in rows if kept(held, name)[0] < 0]
    for name in sorted(set(rows) - set(worse), key=lambda name: (-kept(held, name)[0], name)):
        found, share = held["rows"][name], kept(held, name)
        low, high = interval(share[1:])
        size, colour = size_of(found) or NOTHING, COLOURS.get(name[:4], COLOURS.get(name[:5], "#777777"))
        axes.plot([size, size], [low, high], color=colour, alpha=0.35, linewidth=1)
        axes.plot(size, share[0], "o", color=colour, markersize=4.5)
        label, place_of = name.replace("core RegMean, ", "core, "), (6, _free(size, share[0], placed))
        axes.annotate(
            label, (size, share[0]), place_of, textcoords="offset points", fontsize=6.5, color=colour
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(NOTHING * 0.7, 30_000)
    left = f"; worse than the base, not drawn: {', '.join(worse)}" if worse else ""
    axes.set_xlabel(f"MB told of the examples: moments or gates (far left: nothing){left}")
    axes.set_ylabel("share of the four experts' gains that is kept")
    axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(place, metadata={"Date": None})
    pyplot.close(figure)


def _free(size: float, height: float, placed: list[tuple[float, float]]) -> float:
    """How many points a name has to go down so that it covers none of those before it."""
    shift = -2.0
    per = 0.0022  # of the axis, a point's height

    def taken(at: float) -> bool:
        return any(0.2 < size / other < 5 and abs(at - beside) < 7 * per for other, beside in placed)

    while taken(height + shift * per):
        shift -= 1
    placed.append((size, height + shift * per))
    return shift
