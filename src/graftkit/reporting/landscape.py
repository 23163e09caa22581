"""The landscape of a data set in four panels, after Figure 3 of the Graft paper: t-SNE of the embedded records, their
kinds, their clusters, and the chosen ones as red dots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graftkit.errors import OutputError, missing_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from graftkit.improving.subsample import Subsample

POINTS = 3000  # of the picture, at most
CHOSEN = 1000  # of them chosen records, at most
KINDS = 9  # named; the others go together
_GREY, _RED = "#c6cad0", "#d1242f"
_COLORS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C9", "#1a1a1a")  # without the cycle's grey, which is the others'
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "graftkit", "font.family": "sans-serif", "font.size": 9.0,
    "text.parse_math": False,
}  # fmt: skip


def draw_landscape(made: Subsample, directory: Path, seed: int = 0) -> tuple[Path, ...]:
    """Writes `landscape.svg` and `landscape.png` into a directory; nothing for fewer than 5 records.

    Raises GraftError without matplotlib or scikit-learn, OutputError where they cannot be written.
    """
    if len(made.records.vectors) < 5:
        return ()
    try:
        import matplotlib
    except ImportError as error:
        raise missing_extra("report", "matplotlib") from error
    rows = shown(len(made.records.vectors), made.chosen, seed)
    places = _placed(made.records.vectors[rows].astype(np.float32), seed)
    paths = tuple(directory / f"landscape.{ending}" for ending in ("svg", "png"))
    with matplotlib.rc_context(_SETTINGS):
        figure = _panels(made, rows, places)
        try:
            for path in paths:
                bare = {"metadata": {"Date": None, "Creator": None}} if path.suffix == ".svg" else {}
                figure.savefig(path, dpi=160, **bare)  # type: ignore[arg-type]
        except OSError as error:
            raise OutputError(f"{directory}: cannot be written ({error.strerror})") from error
    return paths


def shown(total: int, chosen: np.ndarray, seed: int) -> np.ndarray:
    """The records of the picture: all, or 3,000, of which chosen ones at most 1,000, each part drawn at random."""
    if total <= POINTS:
        return np.arange(total)
    source = np.random.default_rng(seed)
    red = source.permutation(chosen)[:CHOSEN]
    others = source.permutation(np.setdiff1d(np.arange(total), chosen))[: POINTS - len(red)]
    return np.sort(np.concatenate([red, others]))


def _placed(vectors: np.ndarray, seed: int) -> np.ndarray:
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise missing_extra("data", "scikit-learn") from error
    spread = len(np.unique(vectors, axis=0)) > 2  # principal components of equal points have no scale
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    model = TSNE(perplexity=perplexity, init="pca" if spread else "random", random_state=seed)
    found: np.ndarray = model.fit_transform(vectors)
    return found


def _panels(made: Subsample, rows: np.ndarray, places: np.ndarray) -> Figure:
    from matplotlib.figure import Figure

    total, red = len(made.records.vectors), np.isin(rows, made.chosen)
    figure = Figure(figsize=(11, 11.6), layout="constrained", facecolor="white")
    axes = figure.subplots(2, 2)
    for panel in axes.flat:
        _bare(panel)
    _dots(axes[0, 0], places, "#4f86b5")
    axes[0, 0].set_title("landscape", loc="left")
    title, kinds = _kinds(made, rows)
    _coloured(axes[0, 1], places, kinds, title)
    clusters = [int(made.clusters.labels[row]) for row in rows]
    best = made.clusters.silhouettes.get(len(made.clusters.centroids))
    told = "" if best is None else f", silhouette {best:.3f} on {made.clusters.sample:,} records"
    _numbered(axes[1, 0], places, clusters, f"{len(made.clusters.centroids)} clusters{told}")
    _dots(axes[1, 1], places[~red], _GREY)
    axes[1, 1].scatter(places[red, 0], places[red, 1], s=9, c=_RED, linewidths=0, rasterized=True)
    axes[1, 1].set_title(f"chosen: {len(made.chosen):,} of {total:,} records", loc="left")
    figure.suptitle(
        f"t-SNE of {len(rows):,} of {total:,} records, {int(red.sum()):,} of them chosen", x=0.01, ha="left"
    )
    return figure


def _kinds(made: Subsample, rows: np.ndarray) -> tuple[str, list[str]]:
    """With and without images where some have any, else topics where records name them."""
    pictured, topics = made.records.pictured, made.records.topics
    if not pictured.any() and any(topics):
        return "topics, as the records name them", [topics[row] or "(none)" for row in rows]
    return "modality", ["image and text" if pictured[row] else "text" for row in rows]


def _coloured(panel: Axes, places: np.ndarray, kinds: Sequence[str], title: str) -> None:
    """A colour for each of the most frequent kinds, grey for the others."""
    names, counts = np.unique(np.array(kinds), return_counts=True)
    leading = [str(names[k]) for k in np.argsort(-counts, kind="stable")[:KINDS]]
    rest = np.array([kind not in leading for kind in kinds])
    if rest.any():
        _dots(panel, places[rest], _GREY, f"{len(names) - len(leading)} others")
    for number, name in enumerate(leading):
        _dots(panel, places[np.array(kinds) == name], _COLORS[number], name if len(name) < 40 else f"{name[:38]}…")
    panel.set_title(title, loc="left")
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, 0), frameon=False, fontsize=7, ncols=2, markerscale=2.5)


def _numbered(panel: Axes, places: np.ndarray, clusters: Sequence[int], title: str) -> None:
    """A colour for each cluster, from a wheel that sets neighbours far apart."""
    import matplotlib

    wheel = matplotlib.colormaps["hsv"]
    count = max(clusters) + 1
    colors = [wheel((k * 0.618) % 1 if count > 6 else k / count) for k in clusters]
    panel.scatter(places[:, 0], places[:, 1], s=5, c=colors, linewidths=0, rasterized=True)
    panel.set_title(title, loc="left")


def _dots(panel: Axes, places: np.ndarray, color: str, label: str | None = None) -> None:
    panel.scatter(places[:, 0], places[:, 1], s=5, c=color, linewidths=0, rasterized=True, label=label)


def _bare(panel: Axes) -> None:
    panel.set_xticks([])
    panel.set_yticks([])
    for spine in panel.spines.values():
        spine.set_color("#d0d4d8")
