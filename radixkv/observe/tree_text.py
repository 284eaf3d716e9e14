"""Draws the tree of a cache, as text or as an SVG picture, from `PrefixCache.snapshot()`.

A node is one line: its tokens and pages, who keeps it, and how it reads, if tokens can be decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

__all__ = ["Decode", "Node", "Snapshot", "tree_svg", "tree_text"]

Decode = Callable[[list[int]], str]
"""From token ids to text, such as `tokenizer.decode`."""


Node = Mapping[str, Any]
"""A run of tokens and the pages that hold their K and V: `tokens`, `pages`, `locks`, `pins`, `children`."""

Snapshot = Sequence[Mapping[str, Any]]
"""What `PrefixCache.snapshot()` returns: for each namespace its name, `namespace`, and its nodes, `children`."""


@dataclass(frozen=True)
class _Line:
    """A node in drawing order. `last[i]` says whether its ancestor of depth i + 1, or itself, is the last child."""

    node: Node
    last: tuple[bool, ...]


def _lines(root: Mapping[str, Any]) -> Iterator[_Line]:
    """The nodes of a namespace, parents before children, without recursion: trees of chats are deep."""
    stack = [_Line(child, (i == 0,)) for i, child in enumerate(reversed(root["children"]))]
    while stack:
        line = stack.pop()
        yield line
        children = line.node["children"]
        stack.extend(_Line(child, (*line.last, i == 0)) for i, child in enumerate(reversed(children)))


def _state(node: Node) -> str:
    """What keeps the node from eviction, if anything; a pin is told rather than the leases beside it."""
    return "pinned" if node["pins"] else "leased" if node["locks"] else ""


def _size(node: Node) -> str:
    tokens, pages = len(node["tokens"]), len(node["pages"])
    return f"{tokens} token{'s' * (tokens != 1)}, {pages} page{'s' * (pages != 1)}"


def _preview(node: Node, decode: Decode | None, width: int) -> str:
    """The start of the node in `width` characters: its text, or its token ids where there is no `decode`."""
    ids = [int(token) for token in node["tokens"][: max(width, 1)]]
    text = " ".join(map(str, ids)) if decode is None else decode(ids).replace("\n", "⏎").replace("\t", " ")
    if len(text) > width or len(ids) < len(node["tokens"]):
        return text[: max(width - 1, 0)].rstrip() + "…"
    return text


def _title(root: Mapping[str, Any]) -> str:
    return f"namespace {root['namespace']!r}" if root["namespace"] else "default namespace"


def tree_text(snapshot: Snapshot, decode: Decode | None = None, width: int = 100) -> str:
    """The tree as text of at most about `width` columns, one line a node.

    `decode` turns token ids into text; without it the first ids are shown.
    """
    out: list[str] = []
    for root in snapshot:
        out.append(_title(root) + ("" if root["children"] else ": empty"))
        for node, last in ((line.node, line.last) for line in _lines(root)):
            branch = "".join("   " if end else "│  " for end in last[:-1]) + ("└─ " if last[-1] else "├─ ")
            state = _state(node)
            head = branch + _size(node) + (f", {state}" if state else "")
            out.append(head + "  " + _preview(node, decode, max(width - len(head) - 2, 8)))
    return "\n".join(out) if out else "empty"


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
        rows.append(f'<text x="{LEFT}" y="{y + 19}" class="dim">{escape(_title(root))}</text>')
        parents = [(LEFT + 10, y + 26)]
        y += ROW
        for line in _lines(root):
            depth = len(line.last)
            del parents[depth:]
            rows.append(_svg_node(line.node, decode, depth, y, parents[-1]))
            parents.append((LEFT + depth * INDENT + 10, y + 26))
            y += ROW
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 8}" width="{WIDTH}" height="{y + 8}">\n'
        f'<style>{_STYLE}</style>\n<rect width="100%" height="100%" rx="6" fill="#ffffff"/>\n'
    )
    return head + "\n".join(rows) + "\n</svg>\n"


def _svg_node(node: Node, decode: Decode | None, depth: int, y: int, parent: tuple[int, int]) -> str:
    """The edge from the parent, the box with the node's size, and the node's beginning beside it."""
    x = LEFT + depth * INDENT
    state = _state(node)
    room = max((WIDTH - x - BOX - 24) // 8, 8)
    text = (f"{state}: " if state else "") + _preview(node, decode, max(room - len(state) - 2, 8))
    return (
        f'<path class="edge" d="M{parent[0]} {parent[1]}V{y + 14}H{x}"/>'
        f'<rect class="{state or "node"}" x="{x}" y="{y + 2}" width="{BOX}" height="24" rx="5"/>'
        f'<text x="{x + 8}" y="{y + 19}">{_size(node)}</text>'
        f'<text x="{x + BOX + 10}" y="{y + 19}" class="dim">{escape(text)}</text>'
    )
