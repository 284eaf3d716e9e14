"""The parts of SVG pictures, drawn without any plotting package. `kind` is the class that a picture's style names."""

from __future__ import annotations

from html import escape
from unicodedata import category

__all__ = ["box", "line", "path", "text"]


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """A straight line."""
    return f'<line class="{kind}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>'


def path(kind: str, steps: str) -> str:
    """Lines one after the other, in SVG's own words."""
    return f'<path class="{kind}" d="{steps}"/>'


def box(kind: str, x: float, y: float, width: float, height: float) -> str:
    """A rectangle with rounded corners."""
    return f'<rect class="{kind}" x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" rx="5"/>'


def text(x: float, y: float, words: str, *, kind: str = "", anchor: str = "") -> str:
    """A line of text; `anchor` says which part of it is at x: "start" (as without), "middle" or "end"."""
    style = f' class="{kind}"' * bool(kind) + f' text-anchor="{anchor}"' * bool(anchor)
    return f'<text x="{_n(x)}" y="{_n(y)}"{style}>{escape(_printable(words))}</text>'


def _n(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.1f}"


def _printable(words: str) -> str:
    """Text without what XML forbids: control characters and half surrogate pairs, which names and tokens may have."""
    forbidden = {"Cc", "Cn", "Cs"}
    return "".join("\N{REPLACEMENT CHARACTER}" if category(letter) in forbidden else letter for letter in words)
