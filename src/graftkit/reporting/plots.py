"""Pictures as SVG texts that take the page's colours: transparent, with `currentColor` for all that is not data.

Each picture is drawn narrow, so that it stays legible on a phone; wide pages put several side by side.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from graftkit.errors import missing_extra
from graftkit.measuring.table import Value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCENT = "#c2611f"
OTHER = "#4f86b5"
_LINES = (ACCENT, OTHER, "#4f9a64", "#a05fa8", "#8a8259")
_DASHES: tuple[Any, ...] = ("solid", (0, (4, 1.5)), (0, (1, 1)))
_INK = "#010203"  # stands in for currentColor, which matplotlib does not know
_WIDTH = 4.2  # inches
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # texts stay texts
    "svg.hashsalt": "graftkit",  # the same picture has the same bytes
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.parse_math": False,  # a name may hold a dollar sign
}


@contextmanager
def _drawing() -> Iterator[None]:
    """Our settings while we draw, and only then."""
    try:
        import matplotlib
    except ImportError as error:
        raise missing_extra("report", "matplotlib") from error
    with matplotlib.rc_context(_SETTINGS):
        yield


@_drawing()
def interval_plot(
    labels: Sequence[str],
    values: Sequence[Value],
    *,
    xlabel: str,
    best: frozenset[int] = frozenset(),
    lines: Sequence[float] = (),
    title: str = "",
) -> str:
    """A dot with its interval per label, best ones in the accent colour, dashed lines where asked; NaN is left out."""
    figure, axes = _canvas(0.62 + 0.27 * len(labels))
    for line in lines:
        axes.axvline(line, color=_INK, alpha=0.45, linewidth=0.8, linestyle=(0, (3, 3)))
    for row, value in enumerate(values):
        color = ACCENT if row in best else OTHER
        if value.low is not None and value.high is not None:
            axes.plot(
                [value.low, value.high], [row, row], color=color, linewidth=2.2, solid_capstyle="round", alpha=0.6
            )
        axes.plot([value.value], [row], "o", color=color, markersize=6)
    axes.set_yticks(range(len(labels)), [_short(label) for label in labels])
    axes.margins(x=0.07)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="x", color=_INK, alpha=0.14, linewidth=0.7)
    axes.set_xlabel(xlabel)
    return _svg(figure, title or xlabel)


@_drawing()
def line_plot(
    places: Sequence[int],
    lines: Mapping[str, Sequence[float | None]],
    *,
    xlabel: str,
    ylabel: str,
    line: float | None = None,
    title: str = "",
) -> str:
    """Values by place, one line a name, told apart by colour and by dashes; a dashed mark at `line`; None is a gap."""
    figure, axes = _canvas(2.3 + 0.18 * len(lines))
    if line is not None:
        axes.axhline(line, color=_INK, alpha=0.45, linewidth=0.8, linestyle=(0, (3, 3)))
    for number, (name, values) in enumerate(lines.items()):
        heights = [float("nan") if value is None else value for value in values]
        color, dashes = _line_style(number)
        axes.plot(list(places), heights, color=color, linestyle=dashes, linewidth=1.6, label=_short(name, 44))
    axes.locator_params(axis="x", integer=True)
    return _finished(figure, axes, xlabel, ylabel, title)


@_drawing()
def heat_map(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    label: str,
    rows_are: str = "",
    color: str = ACCENT,
    top: float | None = None,
    middle: float | None = None,
    title: str = "",
) -> str:
    """Values `[rows, columns]` as cells of one colour, faint for 0 and full for `top` (default: the largest value).

    With a `middle`, faint is there, and what lies below it has a colour of its own. NaN leaves a cell empty.
    `rows_are` says what the rows are, such as `layer`.
    """
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    cells = np.ma.masked_invalid(np.array(values, dtype=float))
    figure, axes = _canvas(1.25 + max(0.115 * len(rows), 1.15))
    shades = LinearSegmentedColormap.from_list("shades", [(*to_rgb(color), 0.05), (*to_rgb(color), 1.0)])
    limit = top if top is not None else (float(cells.max()) if cells.count() else 1.0)
    low, high = 0.0, limit or 1.0
    if middle is not None:
        faint = [(*to_rgb(OTHER), 1.0), (*to_rgb(OTHER), 0.05), (*to_rgb(color), 0.05), (*to_rgb(color), 1.0)]
        shades = LinearSegmentedColormap.from_list("sides", list(zip((0, 0.5, 0.5, 1), faint, strict=True)))
        reach = float(abs(cells - middle).max()) if cells.count() else 0.0
        low, high = middle - (reach or 1e-6), middle + (reach or 1e-6)
    mesh = axes.pcolormesh(cells, cmap=shades, vmin=low, vmax=high, linewidth=0)
    step = max(1, len(rows) // 10)
    axes.set_yticks([row + 0.5 for row in range(0, len(rows), step)], [rows[row] for row in range(0, len(rows), step)])
    axes.set_xticks([column + 0.5 for column in range(len(columns))], columns, rotation=40, ha="right")
    axes.tick_params(length=0)
    axes.set_ylabel(rows_are, color=_INK)
    axes.invert_yaxis()
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=30, fraction=0.05)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(colors=_INK, length=0)
    bar.ax.patch.set_alpha(0)
    bar.set_label(label, color=_INK)
    return _svg(figure, title or label)


@_drawing()
def band_plot(lines: Mapping[str, Sequence[tuple[int, Value]]], *, xlabel: str, ylabel: str, title: str = "") -> str:
    """Values by a number that doubles, one line a name, the interval of each value shaded."""
    figure, axes = _canvas(2.4 + 0.16 * len(lines))
    for number, (name, points) in enumerate(lines.items()):
        color, dashes = _line_style(number)
        places, values = [place for place, _ in points], [value for _, value in points]
        low, high = ([v.value if end is None else end for v, end in zip(values, ends, strict=True)]
                     for ends in ([v.low for v in values], [v.high for v in values]))  # fmt: skip
        axes.fill_between(places, low, high, color=color, alpha=0.13, linewidth=0)
        axes.plot(places, [v.value for v in values], color=color, linestyle=dashes, linewidth=1.6,
                  label=_short(name, 44))  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    return _finished(figure, axes, xlabel, ylabel, title)


@_drawing()
def scatter_plot(
    groups: Mapping[str, Sequence[tuple[float, float]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    logarithmic: bool = False,
) -> str:
    """Points of several groups, a colour each, and a dashed line at 0; `logarithmic` in what lies along the page."""
    figure, axes = _canvas(2.6 + 0.16 * len(groups))
    axes.axhline(0, color=_INK, alpha=0.45, linewidth=0.8, linestyle=(0, (3, 3)))
    for number, (name, points) in enumerate(groups.items()):
        color, _ = _line_style(number)
        xs, ys = ([point[k] for point in points] for k in (0, 1))
        axes.plot(xs, ys, "o", color=color, markersize=4.5, alpha=0.8, label=_short(name, 44), markeredgewidth=0)
    if logarithmic:
        axes.set_xscale("log")
    return _finished(figure, axes, xlabel, ylabel, title)


def standalone(svg: str) -> str:
    """A picture as a file of its own: with a width, and a colour that stands out from light and dark grounds."""
    head, rest = svg.split(">", 1)
    spaces = {"xmlns": "http://www.w3.org/2000/svg", "xmlns:xlink": "http://www.w3.org/1999/xlink"}
    missing = "".join(f' {name}="{value}"' for name, value in spaces.items() if f'{name}="' not in head)
    return f'{head}{missing} width="620" color="#7a7a7a">{rest}'


def _finished(figure: Figure, axes: Axes, xlabel: str, ylabel: str, title: str) -> str:
    """Names, a grid and the legend above."""
    axes.grid(axis="y", color=_INK, alpha=0.14, linewidth=0.7)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel, color=_INK)
    figure.legend(loc="outside upper left", frameon=False, labelcolor=_INK, borderaxespad=0, fontsize=8.5)
    return _svg(figure, title or f"{ylabel} by {xlabel}")


def _line_style(number: int) -> tuple[str, Any]:
    """The colour and the dashes of a line, by its place among others."""
    return _LINES[number % len(_LINES)], _DASHES[number // len(_LINES) % len(_DASHES)]


def _canvas(height: float) -> tuple[Figure, Axes]:
    """A figure of its own (no pyplot, no shared state) with bare axes in the page's ink."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(colors=_INK, length=0)
    axes.xaxis.label.set_color(_INK)
    axes.patch.set_alpha(0)
    figure.patch.set_alpha(0)
    return figure, axes


def _svg(figure: Any, title: str) -> str:
    """The figure as an `<svg>` element to be put into a page, named for readers that do not see it."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    text = re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest  # the page decides how large
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", text)
    name = re.sub(r"[<>&\"]", " ", title)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
    return text.replace(_INK, "currentColor")


def _short(label: str, longest: int = 24) -> str:
    """A name that leaves room for the picture."""
    half = (longest - 1) // 2
    return label if len(label) <= longest else f"{label[:half]}…{label[-half:]}"
