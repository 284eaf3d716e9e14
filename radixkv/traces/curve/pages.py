"""A radix tree over the pages of a trace that forgets nothing: which request last touched each page.

A page is the whole prefix up to it. Each page has a key of ``width`` int32 values: its tokens, or one value where the
trace gives block ids that fit the page size (a block's tokens are all equal, so one token stands for the page).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from radixkv.errors import InvalidArgument
from radixkv.traces.request import Tokens, TraceRequest

__all__ = ["PageTree", "Run", "page_keys"]

Run: TypeAlias = tuple[int, int]
"""(owner, number of pages): neighbouring pages of a path that the same request touched last."""


def page_keys(request: TraceRequest, page_size: int) -> tuple[Tokens, int]:
    """The keys of a request's full pages, [pages * width] int32, and the width of a key.

    Covers the input and the output tokens the trace has; what does not fill a page is left out.
    """
    blocks = request.blocks
    if blocks is None:
        tokens = np.concatenate([request.tokens_in, request.tokens_out]) if request.num_out else request.tokens_in
        return tokens[: len(tokens) // page_size * page_size], page_size
    num_pages = blocks.length // page_size
    if blocks.unit == page_size:
        return blocks.ids[:num_pages], 1
    if blocks.unit % page_size:
        return blocks.tokens()[: num_pages * page_size], page_size
    keys = np.repeat(blocks.ids, blocks.unit // page_size)[:num_pages]
    tail = np.full(num_pages - len(keys), blocks.tail, dtype=np.int32)
    return np.concatenate([keys, tail]), 1


class _Node:
    """An edge of the tree: a run of pages that all have the same owner."""

    __slots__ = ("children", "keys", "owner")

    def __init__(self, keys: Tokens, owner: int) -> None:
        self.keys = keys
        self.owner = owner
        self.children: dict[bytes, _Node] = {}


class PageTree:
    """The pages of one namespace. ``num_pages`` counts the distinct ones."""

    def __init__(self) -> None:
        self._root = _Node(np.empty(0, dtype=np.int32), -1)
        self._width = 0
        self.num_pages = 0

    def touch(self, keys: Tokens, width: int, owner: int) -> list[Run]:
        """Make ``owner`` the last to touch every page of the path ``keys``, and add the pages that are new.

        Returns the former owners of the pages seen before, root first. O(len(keys)) to compare, O(1) a node.
        """
        if self._width not in (0, width):
            raise InvalidArgument("the trace mixes token requests and block ids: give each kind a trace of its own")
        self._width = width
        runs: list[Run] = []
        node, pos = self._root, 0
        while pos < len(keys):
            child = node.children.get(keys[pos : pos + width].tobytes())
            if child is None:
                break
            same = _common_pages(child.keys, keys[pos:], width)
            if same * width < len(child.keys):
                self._split(node, child, same * width)
                child = node.children[keys[pos : pos + width].tobytes()]
            if runs and runs[-1][0] == child.owner:
                runs[-1] = (child.owner, runs[-1][1] + same)
            else:
                runs.append((child.owner, same))
            child.owner = owner
            node, pos = child, pos + same * width
        if pos < len(keys):
            self._grow(node, keys[pos:], width, owner)
        return runs

    def _split(self, parent: _Node, node: _Node, at: int) -> None:
        """Divide a node after ``at`` key values: the upper part becomes a new node in its place."""
        width = self._width
        upper = _Node(node.keys[:at].copy(), node.owner)
        node.keys = node.keys[at:].copy()
        upper.children[node.keys[:width].tobytes()] = node
        parent.children[upper.keys[:width].tobytes()] = upper

    def _grow(self, node: _Node, keys: Tokens, width: int, owner: int) -> None:
        """Add new pages below ``node``; a leaf is made longer, so a growing session stays one node."""
        if node is not self._root and not node.children:
            node.keys = np.concatenate([node.keys, keys])
        else:
            node.children[keys[:width].tobytes()] = _Node(keys.copy(), owner)
        self.num_pages += len(keys) // width


def _common_pages(a: Tokens, b: Tokens, width: int) -> int:
    """The number of leading pages that two runs of keys share."""
    num = min(len(a), len(b))
    differs = a[:num] != b[:num]
    first = int(differs.argmax()) if num else 0
    if num and not differs[first]:
        first = num
    return first // width
