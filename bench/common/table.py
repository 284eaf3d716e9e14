"""The table that every benchmark prints: a row for each measure, a column for each contender, the ratio, the goal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

OURS = "radixkv"


@dataclass(frozen=True)
class Row:
    """`ratio`: how many times better than what it is compared with. `met`: None where there is no goal or no figure."""

    measure: str
    unit: str
    figures: dict[str, float]
    ratio: float | None = None
    goal: str = ""
    met: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def beside(measure: str, unit: str, ours: float, other: str, theirs: float, least: float, what: str = "") -> Row:
    """Two times: how many times faster is ours, and is that at least `least`?"""
    return beside_all(measure, unit, ours, {other: theirs}, least, what)


def beside_all(measure: str, unit: str, ours: float, others: dict[str, float], least: float, what: str = "") -> Row:
    """The same with the fastest of several."""
    ratio = min(others.values()) / ours
    return Row(measure, unit, {OURS: ours} | others, ratio, f">= {least:g}x{what}", ratio >= least)


def rows_of(rows: Iterable[Row]) -> dict[str, Any]:
    """For a benchmark's --json."""
    return {"rows": [row.to_dict() for row in rows]}


def text(rows: Iterable[Row]) -> str:
    """The rows under one head, columns in the order in which contenders appear."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    head = ["measure", "unit", *names, "ratio", "goal", ""]
    body = [
        [
            row.measure,
            row.unit,
            *(_figure(row, name) for name in names),
            "-" if row.ratio is None else f"{row.ratio:.4f}x" if row.unit == "%" else f"{row.ratio:.3g}x",
            row.goal,
            {None: "", True: "met", False: "SHORT"}[row.met],
        ]
        for row in rows
    ]
    widths = [max(len(cells[i]) for cells in [head, *body]) for i in range(len(head))]
    lines = []
    for row_cells in [head, *body]:
        cells = zip(row_cells, widths, strict=True)
        lines.append("  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(cells)).rstrip())
    return "\n".join(lines)


def line(result: dict[str, Any]) -> str:
    """Figures that belong together, while a benchmark runs."""
    return "  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items())


def _figure(row: Row, name: str) -> str:
    value = row.figures.get(name)
    if value is None:
        return "-"
    if row.unit == "%":
        return f"{100 * value:.3f}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
