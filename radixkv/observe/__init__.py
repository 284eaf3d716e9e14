"""Pictures of a cache: its tree as text, as SVG and as a page of HTML, from `PrefixCache.snapshot()` or over time."""

from radixkv.observe.log_history import history_of
from radixkv.observe.namespaces import NamespaceStats, by_namespace
from radixkv.observe.snapshot import Decode, Node, Snapshot
from radixkv.observe.timeline import History, Timeline
from radixkv.observe.tree_html import timeline_html, tree_html
from radixkv.observe.tree_svg import tree_svg
from radixkv.observe.tree_text import tree_text

__all__ = [
    "Decode",
    "History",
    "NamespaceStats",
    "Node",
    "Snapshot",
    "Timeline",
    "by_namespace",
    "history_of",
    "timeline_html",
    "tree_html",
    "tree_svg",
    "tree_text",
]
