"""Pictures of a cache: its tree as text and as SVG, from `PrefixCache.snapshot()`."""

from radixkv.observe.tree_text import Decode, Node, Snapshot, tree_svg, tree_text

__all__ = ["Decode", "Node", "Snapshot", "tree_svg", "tree_text"]
