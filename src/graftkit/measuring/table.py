"""The one table that everything measured ends in: for the terminal, for Markdown and for machines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Value:
    """A measured number, with an interval where one is known (both ends or none, in the unit of its column)."""

    value: float
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError(f"an interval has two ends, got low={self.low}, high={self.high}")

    def to_dict(self) -> dict[str, float | None]:
        """`{"value", "low", "high"}`; what is not finite becomes None, since JSON has no NaN."""
        return {"value": _finite(self.value), "low": _finite(self.low), "high": _finite(self.high)}

    @staticmethod
    def from_dict(data: dict[str, float | None]) -> Value:
        """The inverse of `to_dict`."""
        value = data["value"]
        return Value(math.nan if value is None else value, data["low"], data["high"])


Cell = str | int | float | Value | None
"""What a row holds: a text, a number, a number with its interval, or nothing."""


@dataclass(frozen=True)
class Column:
    """A column: its name, the unit of its numbers, which direction is better, and digits after the point."""

    name: str
    unit: str = ""
    better: Literal["higher", "lower"] | None = None
    digits: int = 3

    @property
    def heading(self) -> str:
        """Name and unit, with an arrow where one direction is better: `loss (nats/token) ↓`."""
        unit = f" ({self.unit})" if self.unit else ""
        arrow = {"higher": " ↑", "lower": " ↓", None: ""}[self.better]
        return self.name + unit + arrow


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns; the best value of a column is marked where the column says what better means.

    With `across`, the best value of a row is marked instead. A row shorter or longer than the columns raises
    ValueError: a fault of ours, not of the user.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    note: str = ""
    across: bool = False

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"row {number} has {len(row)} cells, expected {len(self.columns)}")

    def best(self, column: int) -> frozenset[int]:
        """The rows that hold a column's best value: several if tied, none without a direction or a competitor."""
        better = self.columns[column].better
        if better is None:
            return frozenset()
        if self.across:
            chosen = [place for place, other in enumerate(self.columns) if other.better]
            winners = (_best([(place, row[place]) for place in chosen], better) for row in self.rows)
            return frozenset(number for number, found in enumerate(winners) if column in found)
        return _best([(number, row[column]) for number, row in enumerate(self.rows)], better)

    def text(self, row: int, column: int) -> str:
        """One cell as text: `0.512 [0.470, 0.551]`, a dash where there is nothing."""
        value, interval = self.parts(row, column)
        return f"{value} {interval}" if interval else value

    def parts(self, row: int, column: int) -> tuple[str, str]:
        """One cell as two texts: the value, and its interval (empty without one)."""
        return format_cell(self.rows[row][column], self.columns[column].digits)

    def to_rich(self) -> RichTable:
        """For the terminal: numbers to the right, the best value of a column in bold green."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=self.title or None, caption=self.note or None, header_style="bold")
        for index, column in enumerate(self.columns):
            table.add_column(Text(column.heading), justify="right" if self.numeric(index) else "left")
        best = [self.best(index) for index in range(len(self.columns))]
        for row in range(len(self.rows)):
            styles = ["bold green" if row in best[index] else "" for index in range(len(self.columns))]
            table.add_row(*(Text(self.text(row, index), style=style) for index, style in enumerate(styles)))
        return table

    def to_markdown(self) -> str:
        """A Markdown table, the best value of a column in bold; title above and note below when there are any."""
        heads = [_markdown(column.heading) for column in self.columns]
        rules = ["---:" if self.numeric(index) else "---" for index in range(len(self.columns))]
        best = [self.best(index) for index in range(len(self.columns))]
        lines = [_line(heads), _line(rules)]
        for row in range(len(self.rows)):
            texts = [_markdown(self.text(row, index)) for index in range(len(self.columns))]
            lines.append(_line([f"**{text}**" if row in best[index] else text for index, text in enumerate(texts)]))
        return "\n\n".join(part for part in (self.title, "\n".join(lines), self.note) if part)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: title, note, columns, rows (a value with an interval as `{"value", "low", "high"}`), best rows."""
        columns = [
            {"name": c.name, "unit": c.unit, "better": c.better, "best": sorted(self.best(index))}
            for index, c in enumerate(self.columns)
        ]
        rows = [[_plain(cell) for cell in row] for row in self.rows]
        return {"title": self.title, "note": self.note, "columns": columns, "rows": rows}

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers (empty cells aside)."""
        cells = [row[column] for row in self.rows if row[column] is not None]
        return bool(cells) and not any(isinstance(cell, str) for cell in cells)


def format_cell(cell: Cell, digits: int = 3) -> tuple[str, str]:
    """A cell as text: the value, and its interval (empty without one). NaN and None are a dash."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "–", ""
    if isinstance(cell, str):
        return cell, ""
    if isinstance(cell, int):
        return f"{cell:,}", ""
    if isinstance(cell, float):
        return f"{cell:.{digits}f}", ""
    if cell.low is None or cell.high is None:
        return format_cell(cell.value, digits)
    return format_cell(float(cell.value), digits)[0], f"[{cell.low:.{digits}f}, {cell.high:.{digits}f}]"


def _best(cells: list[tuple[int, Cell]], better: str) -> frozenset[int]:
    """The keys of the best cells, several if tied; none where there is nothing to choose between."""
    numbers = {key: _number(cell) for key, cell in cells}
    known = {key: number for key, number in numbers.items() if number is not None}
    if len(set(known.values())) < 2:
        return frozenset()
    top = max(known.values()) if better == "higher" else min(known.values())
    return frozenset(key for key, number in known.items() if number == top)


def _number(cell: Cell) -> float | None:
    value = cell.value if isinstance(cell, Value) else cell
    return None if isinstance(value, str) else _finite(value)


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _plain(cell: Cell) -> Any:
    if isinstance(cell, Value):
        return cell.to_dict()
    return cell if isinstance(cell, str) else _finite(cell)


def _markdown(text: str) -> str:
    for character in "\\|*_`<":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
