"""Draws the tree of a cache as an SVG picture, from `PrefixCache.snapshot()`."""

from __future__ import annotations

from radixkv.observe import svg
from radixkv.observe.snapshot import Decode, Node, Snapshot, lines, preview, size, state, title

__all__ = ["tree_svg"]

ROW, INDENT, LEFT, BOX, WIDTH = 34, 28, 16, 196, 860
"""Pixels: height of a row, indentation of a level, margin, width of a node's box, width of the picture."""

_STYLE = """\
text{font:13px ui-monospace,Menlo,Consolas,monospace;fill:#1f2328}
.dim{fill:#59636e}.edge{fill:none;stroke:#9aa4ae;stroke-width:1.5}
.node{fill:#eef2f6;stroke:#9aa4ae}.leased{fill:#dbeafe;stroke:#2563eb}.pinned{fill:#fef3c7;stroke:#b45309}"""


def tree_svg(snapshot: Snapshot, decode: Decode | None = None) -> str:
    """The tree as one SVG picture: a box a node, blue where leased, yellow where pinned, its beginning beside it."""
    rows: list[str] = []
    y = 8
    for root in snapshot:
        rows.append(svg.text(LEFT, y + 19, title(root), kind="dim"))
        parents = [(LEFT + 10, y + 26)]
        y += ROW
        for line in lines(root):
            depth = len(line.last)
            del parents[depth:]
            rows.append(_node(line.node, decode, depth, y, parents[-1]))
            parents.append((LEFT + depth * INDENT + 10, y + 26))
            y += ROW
    rows += _legend(y + 8)
    y += ROW
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 8}" width="{WIDTH}" height="{y + 8}">\n'
        f'<style>{_STYLE}</style>\n<rect width="100%" height="100%" rx="6" fill="#ffffff"/>\n'
    )
    return head + "\n".join(rows) + "\n</svg>\n"


def _legend(y: int) -> list[str]:
    """What the colours say."""
    parts = []
    for x, kind, words in ((LEFT, "leased", "leased"), (120, "pinned", "pinned"), (224, "node", "evictable")):
        parts += [svg.box(f"key {kind}", x, y, 16, 16), svg.text(x + 24, y + 13, words, kind="dim")]
    return parts


def _node(node: Node, decode: Decode | None, depth: int, y: int, parent: tuple[int, int]) -> str:
    """The edge from the parent, the box with the node's size, and the node's beginning beside it."""
    x = LEFT + depth * INDENT
    kept = state(node)
    room = max((WIDTH - x - BOX - 24) // 8, 8)
    words = (f"{kept}: " if kept else "") + preview(node, decode, max(room - len(kept) - 2, 8))
    return (
        svg.path("edge", f"M{parent[0]} {parent[1]}V{y + 14}H{x}")
        + svg.box(kept or "node", x, y + 2, BOX, 24)
        + svg.text(x + 8, y + 19, size(node))
        + svg.text(x + BOX + 10, y + 19, words, kind="dim")
    )
