"""What formats of K and V lose against what they take, as one SVG picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

from radixkv.observe import svg

__all__ = ["loss_svg"]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 420, 76, 24, 56, 52
_FLOOR = 1e-7  # of the logarithmic axis
_STYLE = (
    "text{font:13px sans-serif;fill:#333}.title{font-size:15px;font-weight:600}.dim{fill:#667}"
    ".grid{stroke:#e4e4e8}.bound{stroke:#c33;stroke-dasharray:5 4}.point{fill:#1f6fb4}.chosen{fill:#0a7d33}"
)


def loss_svg(title: str, points: Sequence[tuple[str, int, float, bool]], max_kl: float) -> str:
    """A point for each plan: (name, bytes a token, mean KL in nats, whether it was chosen); a line at the bound.

    Names stand at plans of one format and at the chosen one.
    """
    most_bytes = 1.08 * max(size for _, size, _, _ in points)
    low = math.log10(max(_FLOOR, min((kl for _, _, kl, _ in points if kl > 0), default=_FLOOR))) - 0.3
    high = math.log10(max([_FLOOR * 10, max_kl, *(kl for _, _, kl, _ in points)])) + 0.4

    def x(size: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * size / most_bytes

    def y(kl: float) -> float:
        share = (math.log10(max(kl, 10**low)) - low) / (high - low)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}">',
        f"<style>{_STYLE}</style>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        svg.text(16, 28, title, kind="title"),
        svg.text(_WIDTH - _RIGHT, _HEIGHT - 14, "bytes a token, all layers", kind="dim", anchor="end"),
        svg.text(16, 48, "mean KL, nats a token", kind="dim"),
    ]
    for power in range(math.ceil(low), math.floor(high) + 1):
        at = y(10.0**power)
        parts.append(svg.line("grid", _LEFT, at, _WIDTH - _RIGHT, at))
        parts.append(svg.text(_LEFT - 8, at + 4, f"1e{power}", kind="dim", anchor="end"))
    if max_kl > 0:
        at = y(max_kl)
        parts.append(svg.line("bound", _LEFT, at, _WIDTH - _RIGHT, at))
    for name, size, kl, chosen in points:
        kind = "chosen" if chosen else "point"
        parts.append(f'<circle class="{kind}" cx="{x(size):.1f}" cy="{y(kl):.1f}" r="{6 if chosen else 4}"/>')
        if not chosen and " x " in name:  # between the others: its name would lie on theirs
            continue
        anchor = "end" if x(size) > 0.7 * _WIDTH else "start"
        shift = -9 if anchor == "end" else 9
        parts.append(svg.text(x(size) + shift, y(kl) - 7, f"{name}, {size:,} B", anchor=anchor))
    return "\n".join([*parts, "</svg>"]) + "\n"
