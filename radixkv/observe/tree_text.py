"""Draws the tree of a cache as text, from `PrefixCache.snapshot()`.

A node is one line: its tokens and pages, who keeps it, and how it reads, if tokens can be decoded.
"""

from __future__ import annotations

from radixkv.observe.snapshot import Decode, Snapshot, lines, preview, size, state, title

__all__ = ["tree_text"]


def tree_text(snapshot: Snapshot, decode: Decode | None = None, width: int = 100) -> str:
    """The tree as text of at most about `width` columns, one line a node.

    `decode` turns token ids into text; without it the first ids are shown.
    """
    out: list[str] = []
    for root in snapshot:
        out.append(title(root) + ("" if root["children"] else ": empty"))
        for node, last in ((line.node, line.last) for line in lines(root)):
            branch = "".join("   " if end else "│  " for end in last[:-1]) + ("└─ " if last[-1] else "├─ ")
            kept = state(node)
            head = branch + size(node) + (f", {kept}" if kept else "")
            out.append(head + "  " + preview(node, decode, max(width - len(head) - 2, 8)))
    return "\n".join(out) if out else "empty"
