"""A capacity curve as one SVG picture, drawn without any plotting package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log10
from typing import TYPE_CHECKING

from radixkv.observe import svg

if TYPE_CHECKING:
    from radixkv.traces.curve.points import CapacityCurve

__all__ = ["curve_svg"]

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 44, 56
_MAX_POINTS = 500
_STYLE = (
    "text{font:13px sans-serif;fill:#333}.title{font-size:15px;font-weight:600}.grid{stroke:#ddd}"
    ".axis{stroke:#333}.curve{fill:none;stroke:#1f6fb4;stroke-width:2}.future{fill:none;stroke:#c2410c;stroke-width:6;stroke-linecap:round}"
    ".told{fill:none;stroke:#15803d;stroke-width:6;stroke-linecap:round}"
    ".bound{stroke:#999;stroke-dasharray:4 4}"
)


_KINDS = {"clairvoyant": "future", "with hints": "told"}


def curve_svg(
    curve: CapacityCurve, title: str = "", marks: Mapping[str, Sequence[tuple[int, float]]] | None = None
) -> str:
    """The curve as an SVG document: hit rate in percent over the capacity in tokens, on a logarithmic axis.

    The dashed line is the hit rate of an unbounded cache. ``marks`` are dots (capacity in pages, hit rate), by name:
    "clairvoyant" and "with hints".
    """
    axis = _LogAxis(curve.page_size, max(curve.max_pages, 2) * curve.page_size)
    limit = curve.hit_rate(curve.max_pages)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}">',
        f"<style>{_STYLE}</style>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        svg.text(_LEFT, 24, title or "Hit rate by capacity", kind="title"),
        *_horizontal_grid(),
        *axis.vertical_grid(),
        svg.line("bound", _LEFT, _y(limit), _WIDTH - _RIGHT, _y(limit)),
        svg.line("axis", _LEFT, _TOP, _LEFT, _HEIGHT - _BOTTOM),
        svg.line("axis", _LEFT, _HEIGHT - _BOTTOM, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM),
        *_marks(marks or {}, curve.page_size, axis),
        svg.path("curve", _steps(curve, axis)),
        svg.text(_WIDTH - _RIGHT, _y(limit) - 6, f"unbounded: {100 * limit:.1f} %", anchor="end"),
        svg.text(
            (_LEFT + _WIDTH - _RIGHT) / 2,
            _HEIGHT - 12,
            f"capacity (tokens; pages of {curve.page_size})",
            anchor="middle",
        ),
        f'<text x="18" y="{_y(0.5):.1f}" text-anchor="middle" transform="rotate(-90 18 {_y(0.5):.1f})">'
        "hit rate (% of input tokens)</text>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


class _LogAxis:
    """Maps a capacity in tokens to an x coordinate, on a logarithmic scale."""

    def __init__(self, first: int, last: int) -> None:
        self._first, self._last = first, last

    def x(self, tokens: float) -> float:
        """The x coordinate of a capacity of at least one page."""
        share = (log10(tokens) - log10(self._first)) / (log10(self._last) - log10(self._first))
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def has(self, tokens: int) -> bool:
        """Whether a capacity lies on the axis."""
        return self._first <= tokens <= self._last

    def vertical_grid(self) -> list[str]:
        """A line and a label at each power of ten, or at both ends where the axis spans less than one."""
        ticks = [10**power for power in range(16) if self._first <= 10**power <= self._last]
        parts = []
        for tick in ticks if len(ticks) > 1 else [self._first, self._last]:
            x = self.x(tick)
            parts.append(svg.line("grid", x, _TOP, x, _HEIGHT - _BOTTOM))
            parts.append(svg.text(x, _HEIGHT - _BOTTOM + 18, _short(tick), anchor="middle"))
        return parts


def _horizontal_grid() -> list[str]:
    parts = []
    for percent in range(0, 101, 20):
        y = _y(percent / 100)
        parts.append(svg.line("grid", _LEFT, y, _WIDTH - _RIGHT, y))
        parts.append(svg.text(_LEFT - 8, y + 4, str(percent), anchor="end"))
    return parts


def _steps(curve: CapacityCurve, axis: _LogAxis) -> str:
    """The path: the rate holds from its capacity to the next one."""
    points = curve.points(_MAX_POINTS)
    path = [f"M{axis.x(curve.page_size):.1f},{_y(curve.hit_rate(0)):.1f}"]
    for pages, rate in points[1:]:
        path.append(f"H{axis.x(pages * curve.page_size):.1f}V{_y(rate):.1f}")
    return "".join(path) + f"H{_WIDTH - _RIGHT}"


def _marks(marks: Mapping[str, Sequence[tuple[int, float]]], page_size: int, axis: _LogAxis) -> list[str]:
    """Figures at single capacities, as dots: a line between two of them could run below the curve. With a key."""
    parts, names = [], []
    for name, points in marks.items():
        drawn = [(axis.x(pages * page_size), _y(rate)) for pages, rate in points if axis.has(pages * page_size)]
        if drawn:
            parts.append(svg.path(_KINDS[name], "".join(f"M{left:.1f},{top:.1f}h0" for left, top in drawn)))
            names.append(name)
    if not names:
        return []
    x, y = _WIDTH - _RIGHT - 130, _HEIGHT - _BOTTOM - 20 - 20 * len(names)
    for row, name in enumerate(names):
        parts.append(svg.path(f"{_KINDS[name]} key", f"M{x + 14},{y + 20 * row}h0"))
        parts.append(svg.text(x + 36, y + 20 * row + 4, name))
    bottom = y + 20 * len(names)
    return [*parts, svg.line("curve", x, bottom, x + 28, bottom), svg.text(x + 36, bottom + 4, "LRU")]


def _y(rate: float) -> float:
    return _HEIGHT - _BOTTOM - rate * (_HEIGHT - _TOP - _BOTTOM)


def _short(tokens: int) -> str:
    """12000 as 12k, 3000000 as 3M."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if tokens >= size:
            return f"{tokens / size:g}{unit}" if tokens % size == 0 else f"{tokens / size:.1f}{unit}"
    return str(tokens)
