"""The formats of a model side by side, as one SVG picture."""

from __future__ import annotations

from collections.abc import Sequence

from radixkv.memory import format_bytes
from radixkv.observe import svg

__all__ = ["formats_svg"]

_WIDTH, _LEFT, _ROW, _TOP, _BAR = 720, 72, 34, 72, 300
_STYLE = (
    "text{font:13px sans-serif;fill:#333}.title{font-size:15px;font-weight:600}.dim{fill:#667}"
    ".bar{fill:#1f6fb4}.frame{fill:none;stroke:#ddd}"
)


def formats_svg(title: str, subtitle: str, rows: Sequence[tuple[str, int, int | None, int | None]]) -> str:
    """A bar for each of ``rows``: format, bytes a token, requests that fit, bytes for a hit rate; None: not asked."""
    height = _TOP + _ROW * len(rows) + 12
    largest = max(size for _, size, _, _ in rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}">',
        f"<style>{_STYLE}</style>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        svg.text(16, 26, title, kind="title"),
        svg.text(16, 48, subtitle, kind="dim"),
    ]
    for i, (name, size, requests, needed) in enumerate(rows):
        y = _TOP + _ROW * i
        fits = "" if requests is None else f", {requests:,} request{'s' * (requests != 1)}"
        needs = "" if needed is None else f", needs {format_bytes(needed)}"
        parts += [
            svg.text(_LEFT - 10, y + 17, name, anchor="end"),
            svg.box("frame", _LEFT, y, _BAR, 24),
            svg.box("bar", _LEFT, y, _BAR * size / largest, 24),
            svg.text(_LEFT + _BAR + 12, y + 17, f"{format_bytes(size)} a token{fits}{needs}"),
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"
