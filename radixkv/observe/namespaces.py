"""Who has how much of a cache: pages and tokens of each namespace, from `PrefixCache.snapshot()`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from radixkv.observe.snapshot import Snapshot

__all__ = ["NamespaceStats", "by_namespace"]


@dataclass(frozen=True)
class NamespaceStats:
    """What is published in one namespace. Pages that leases have not published are in none."""

    tokens: int = 0
    pages: int = 0
    protected: int = 0  #: of them, pages that a lease or a pin uses
    pinned: int = 0  #: of them, pages that a pin keeps


def by_namespace(snapshot: Snapshot) -> dict[str, NamespaceStats]:
    """The figures of each namespace that has anything cached or leased, in alphabetical order. O(nodes).

    In a hierarchical cache a namespace has what it published itself.
    """
    found: dict[str, list[int]] = {}
    nodes = [(root["namespace"], root) for root in snapshot]
    while nodes:
        namespace, node = nodes.pop()
        nodes += [(child.get("namespace", namespace), child) for child in node["children"]]
        counts = found.setdefault(namespace, [0, 0, 0, 0])
        pages = len(node.get("pages", ()))
        for i, more in enumerate((len(node.get("tokens", ())), pages, pages * (node["locks"] > 0))):
            counts[i] += more
        counts[3] += pages * (node["pins"] > 0)
    return {namespace: NamespaceStats(*found[namespace]) for namespace in sorted(found)}
