"""Pictures of a cache: its tree as text and as SVG, from `PrefixCache.snapshot()`."""

from radixkv.observe.snapshot import Decode, Node, Snapshot
from radixkv.observe.tree_svg import tree_svg
from radixkv.observe.tree_text import tree_text

__all__ = ["Decode", "Node", "Snapshot", "tree_svg", "tree_text"]
