"""Draws the tree of a cache as one self-contained HTML page: an icicle to look at, search, and move through time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from radixkv.errors import InvalidArgument
from radixkv.observe.snapshot import Decode, Snapshot, state
from radixkv.observe.timeline import History, Run

__all__ = ["MAX_TOKENS", "timeline_html", "tree_html"]

MAX_TOKENS = 4_000_000
"""The most tokens of a page of HTML: each is about six bytes of it."""


def tree_html(snapshot: Snapshot, decode: Decode | None = None, title: str = "The cache") -> str:
    """The page for a snapshot, as `PrefixCache.snapshot()` gives it: colours show what is leased and pinned.

    ``decode`` turns token ids into text, such as `tokenizer.decode`; without it ids are shown. Raises InvalidArgument
    for more than MAX_TOKENS tokens.
    """
    runs: list[Run] = []
    for root in snapshot:
        todo: list[tuple[int, Mapping[str, Any]]] = [(-1, child) for child in reversed(root["children"])]
        while todo:
            parent, node = todo.pop()
            todo += [(len(runs), child) for child in reversed(node["children"])]
            tokens = np.asarray(node["tokens"], dtype=np.int32)
            above = runs[parent].namespace if parent >= 0 else root["namespace"]
            runs.append(Run(parent, node.get("namespace", above), tokens, len(node["pages"]), state=state(node)))
    return _page(History(0, runs), decode, title)


def timeline_html(history: History, decode: Decode | None = None, title: str = "The cache over time") -> str:
    """The page for a `Timeline` or a `history_of` a log: a slider over its steps, colours show how long ago a page was
    used. Else `tree_html`.
    """
    return _page(history, decode, title)


def _page(history: History, decode: Decode | None, title: str) -> str:
    runs = history.runs
    total = sum(len(run.tokens) for run in runs)
    if total > MAX_TOKENS:
        raise InvalidArgument(
            f"{total} tokens in all are too many for a page of HTML: it holds {MAX_TOKENS}; "
            "show fewer requests or steps"
        )
    names = list(dict.fromkeys(run.namespace for run in runs))
    data = {
        "namespaces": names,
        "namespace": [names.index(run.namespace) for run in runs],
        "parent": [run.parent for run in runs],
        "pages": [run.num_pages for run in runs],
        "born": [run.born for run in runs],
        "died": [run.died for run in runs],
        "state": [run.state for run in runs],
        "tokens": [_tokens(run) for run in runs],
        "text": None if decode is None else [decode([int(token) for token in run.tokens]) for run in runs],
        "uses": history.uses,
        "moments": history.moments,
        "num_pages": history.num_pages,
    }
    words = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    template = (Path(__file__).parent / "tree.html").read_text(encoding="utf-8")
    return template.replace("{{title}}", escape(title)).replace("{{data}}", words)


def _tokens(run: Run) -> list[int]:
    """The tokens; [-n, token] for n equal ones, of which traces of block ids consist."""
    found: list[int] = run.tokens.tolist()
    return [-len(found), found[0]] if len(found) > 2 and found.count(found[0]) == len(found) else found
