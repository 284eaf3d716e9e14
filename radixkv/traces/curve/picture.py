"""Capacity curves as one SVG picture, drawn without any plotting package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log10
from typing import TYPE_CHECKING

from radixkv.errors import InvalidArgument
from radixkv.memory import format_bytes
from radixkv.observe import svg

if TYPE_CHECKING:
    from radixkv.traces.curve.points import CapacityCurve

__all__ = ["MAX_CURVES", "Drawn", "Memory", "curves_svg"]

_WIDTH, _HEIGHT = 720, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 88, 56
_MAX_POINTS = 500
_COLOURS = ("#1f6fb4", "#c2410c", "#15803d", "#7c3aed", "#a16207", "#0e7490", "#be185d", "#475569")
_STYLE = (
    "text{font:13px sans-serif;fill:#333}.title{font-size:15px;font-weight:600}.dim{fill:#667}.grid{stroke:#ddd}"
    ".axis{stroke:#333}.lru,.clairvoyant,.hints{fill:none;stroke-width:2}.clairvoyant{stroke-dasharray:7 4}"
    ".hints{stroke-dasharray:2 3}.dots{stroke-width:5;stroke-linecap:round}.key{fill:#fff;fill-opacity:.85}"
    + "".join(f".c{i}{{stroke:{colour}}}" for i, colour in enumerate(_COLOURS))
)
_LINES = {"lru": "LRU", "hints": "LRU with hints", "clairvoyant": "clairvoyant"}

MAX_CURVES = len(_COLOURS)


@dataclass(frozen=True)
class Drawn:
    """A trace's curve and, where they were computed, what no policy exceeds and what hints give: (pages, hit rate)."""

    name: str
    curve: CapacityCurve
    clairvoyant: Sequence[tuple[int, float]] = ()
    hints: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Memory:
    """What a second axis counts: bytes, of a model's tokens."""

    bytes_per_token: float
    what: str
    """The model and its format."""


def curves_svg(drawn: Sequence[Drawn], title: str = "Hit rate by capacity", memory: Memory | None = None) -> str:
    """The curves as an SVG document: hit rate in percent over the capacity in tokens, on a logarithmic axis.

    A colour is a trace; where there is only one, a line. Bounds and hints are lines between dots: they are known there.
    Raises InvalidArgument for no curve, for more than MAX_CURVES, and for different page sizes.
    """
    if not 1 <= len(drawn) <= MAX_CURVES or len({each.curve.page_size for each in drawn}) > 1:
        raise InvalidArgument(f"a picture has 1 to {MAX_CURVES} curves of one page size, not {len(drawn)} of any")
    page = drawn[0].curve.page_size
    axis = _LogAxis(page, max(2, *(each.curve.max_pages for each in drawn)) * page)
    lines = []
    for i, each in enumerate(drawn):
        several = len(drawn) > 1
        lines += _points_line("clairvoyant", i if several else 1, each.clairvoyant, page, axis)
        lines += _points_line("hints", i if several else 2, each.hints, page, axis)
        lines.append(svg.path(f"lru c{i}", _steps(each.curve, axis)))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}">',
        f"<style>{_STYLE}</style>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        svg.text(_LEFT, 24, title, kind="title"),
        *_horizontal_grid(),
        *axis.tokens_grid(),
        *([] if memory is None else axis.memory_scale(memory)),
        svg.line("axis", _LEFT, _TOP, _LEFT, _HEIGHT - _BOTTOM),
        svg.line("axis", _LEFT, _HEIGHT - _BOTTOM, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM),
        *lines,
        *_key(drawn),
        svg.text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, f"capacity (tokens; pages of {page})", anchor="middle"),
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

    def has(self, tokens: float) -> bool:
        """Whether a capacity lies on the axis."""
        return self._first <= tokens <= self._last

    def tokens_grid(self) -> list[str]:
        """A line and a label at each power of ten, or at both ends where the axis spans less than one."""
        ticks = [10**power for power in range(16) if self._first <= 10**power <= self._last]
        parts = []
        for tick in ticks if len(ticks) > 1 else [self._first, self._last]:
            x = self.x(tick)
            parts.append(svg.line("grid", x, _TOP, x, _HEIGHT - _BOTTOM))
            parts.append(svg.text(x, _HEIGHT - _BOTTOM + 18, _short(tick), anchor="middle"))
        return parts

    def memory_scale(self, memory: Memory) -> list[str]:
        """The same capacities in bytes, above: 1, 10 and 100 of each unit, or both ends."""
        sizes = [tens * 1024**power for power in range(7) for tens in (1, 10, 100)]
        ticks = [size for size in sizes if self.has(size / memory.bytes_per_token)]
        if len(ticks) < 2:
            ticks = [round(end * memory.bytes_per_token) for end in (self._first, self._last)]
        token = format_bytes(round(memory.bytes_per_token))
        parts = [svg.text(_LEFT, 48, f"above: memory for {memory.what}, {token} a token", kind="dim")]
        for size in ticks:
            x = self.x(size / memory.bytes_per_token)
            parts.append(svg.line("axis", x, _TOP - 5, x, _TOP))
            parts.append(svg.text(x, _TOP - 10, format_bytes(size), anchor="middle"))
        return [*parts, svg.line("axis", _LEFT, _TOP, _WIDTH - _RIGHT, _TOP)]


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


def _points_line(
    kind: str, colour: int, points: Sequence[tuple[int, float]], page_size: int, axis: _LogAxis
) -> list[str]:
    """A line through figures at single capacities, and a dot at each."""
    places = [(axis.x(pages * page_size), _y(rate)) for pages, rate in points if axis.has(pages * page_size)]
    if not places:
        return []
    words = [f"{left:.1f},{top:.1f}" for left, top in sorted(places)]
    dots = "".join(f"M{word}h0" for word in words)
    return [svg.path(f"{kind} c{colour}", "M" + "L".join(words)), svg.path(f"dots c{colour}", dots)]


def _key(drawn: Sequence[Drawn]) -> list[str]:
    """What colours and dashes say, at the lower right, where a curve seldom is."""
    kinds = [kind for kind in _LINES if kind == "lru" or any(getattr(each, kind) for each in drawn)]
    if len(drawn) == 1:
        colours = {"lru": 0, "clairvoyant": 1, "hints": 2}
        curve = drawn[0].curve
        best = f"{100 * curve.hit_rate(curve.max_pages):.1f} % unbounded"
        rows = [(f"{kind} c{colours[kind]}", _LINES[kind] + (f", {best}" if kind == "lru" else "")) for kind in kinds]
    else:
        rows = [(f"lru c{i}", each.name) for i, each in enumerate(drawn)]
        rows += [(f"{kind} c7", _LINES[kind]) for kind in kinds[1:]]
    wide = 60 + 7 * max(len(words) for _, words in rows)
    x, y = _WIDTH - _RIGHT - wide - 8, _HEIGHT - _BOTTOM - 20 * len(rows) - 14
    parts = [svg.box("key", x - 10, y - 4, wide + 10, 20 * len(rows) + 6)]
    for row, (kind, words) in enumerate(rows):
        at = y + 20 * row + 9
        parts += [svg.path(kind, f"M{x},{at}h32"), svg.text(x + 42, at + 4, words)]
    return parts


def _y(rate: float) -> float:
    return _HEIGHT - _BOTTOM - rate * (_HEIGHT - _TOP - _BOTTOM)


def _short(tokens: int) -> str:
    """12000 as 12k, 3000000 as 3M."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if tokens >= size:
            return f"{tokens / size:g}{unit}" if tokens % size == 0 else f"{tokens / size:.1f}{unit}"
    return str(tokens)
