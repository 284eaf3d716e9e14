"""What the pictures of a tree share: a node in drawing order, and what is written about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Decode", "Line", "Node", "Snapshot", "lines", "preview", "size", "state", "title"]

Decode = Callable[[list[int]], str]
"""From token ids to text, such as `tokenizer.decode`."""

Node = Mapping[str, Any]
"""A run of tokens and the pages that hold their K and V: `tokens`, `pages`, `locks`, `pins`, `children`."""

Snapshot = Sequence[Mapping[str, Any]]
"""What `PrefixCache.snapshot()` returns: for each namespace its name, `namespace`, and its nodes, `children`."""


@dataclass(frozen=True)
class Line:
    """A node in drawing order. `last[i]` says whether its ancestor of depth i + 1, or itself, is the last child."""

    node: Node
    last: tuple[bool, ...]


def lines(root: Mapping[str, Any]) -> Iterator[Line]:
    """The nodes of a namespace, parents before children, without recursion: trees of chats are deep."""
    stack = [Line(child, (i == 0,)) for i, child in enumerate(reversed(root["children"]))]
    while stack:
        line = stack.pop()
        yield line
        children = line.node["children"]
        stack.extend(Line(child, (*line.last, i == 0)) for i, child in enumerate(reversed(children)))


def state(node: Node) -> str:
    """What keeps the node from eviction, if anything; a pin is told rather than the leases beside it."""
    return "pinned" if node["pins"] else "leased" if node["locks"] else ""


def size(node: Node) -> str:
    """How many tokens and pages the node has."""
    tokens, pages = len(node["tokens"]), len(node["pages"])
    return f"{tokens} token{'s' * (tokens != 1)}, {pages} page{'s' * (pages != 1)}"


def preview(node: Node, decode: Decode | None, width: int) -> str:
    """The start of the node in `width` characters: its text, or its token ids where there is no `decode`."""
    ids = [int(token) for token in node["tokens"][: max(width, 1)]]
    text = " ".join(map(str, ids)) if decode is None else decode(ids).replace("\n", "⏎").replace("\t", " ")
    if len(text) > width or len(ids) < len(node["tokens"]):
        return _whole_words(text, max(width - 1, 0)) + "…"
    return text


def _whole_words(text: str, width: int) -> str:
    """The start of a text in `width` characters, up to the end of a word (or id) where one ends there."""
    if len(text) <= width:
        return text.rstrip()
    end = text.rfind(" ", 0, width + 1)
    return text[: end if end > 0 else width].rstrip()


def title(root: Mapping[str, Any]) -> str:
    """The name of a namespace."""
    return f"namespace {root['namespace']!r}" if root["namespace"] else "default namespace"
