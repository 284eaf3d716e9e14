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
    """The figures of each namespace that has anything cached or leased, in alphabetical order. O(nodes)."""
    found = {}
    for root in snapshot:
        tokens = pages = protected = pinned = 0
        nodes = list(root["children"])
        while nodes:
            node = nodes.pop()
            nodes += node["children"]
            tokens += len(node["tokens"])
            pages += len(node["pages"])
            protected += len(node["pages"]) * (node["locks"] > 0)
            pinned += len(node["pages"]) * (node["pins"] > 0)
        found[root["namespace"]] = NamespaceStats(tokens, pages, protected, pinned)
    return found
