"""Write-through: what the tree publishes is copied to the hub and stored, without holding anything meanwhile.

A published page never changes while it is in the tree, and leaves it before anybody may write to it. So a page is
copied without a lock, and the journal is asked afterwards whether it was there all the time; if not, the copy is
thrown away.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from radixkv.journal import NAMESPACE, STORED, Batch, Journal
from radixkv.tiers.hub import Hub
from radixkv.tiers.identity import Keys, Named
from radixkv.tiers.record import Layout, Record
from radixkv.tiers.store import PageStore

__all__ = ["Writer"]

_BACKLOG, _BATCH = 1 << 14, 64


class _Page(NamedTuple):
    page: int
    number: int  # of its record in the journal
    key: bytes
    parent: bytes
    tag: bytes
    tokens: bytes


class Writer:
    """A reader of the journal. `follow` and `copy` are called from one thread at a time each."""

    def __init__(
        self, journal: Journal, keys: Keys, hub: Hub, layout: Layout, pages: PageStore, which: str = "all"
    ) -> None:
        self.skipped = 0  #: pages not stored, because too many waited
        self.discarded = 0  #: copies of pages that left the tree meanwhile
        self._journal, self._keys, self._hub, self._layout, self._pages = journal, keys, hub, layout, pages
        self._which = which  # pages: "all", "second" (once a request has found them in the pool) or "none"
        self._once: dict[bytes, _Page] = {}  # published, and not found yet
        self._cursor, self._releases = 0, journal.releases_end
        self._names: dict[int, str] = {}
        self._known: dict[int, Named] = {}  # by page
        self._waiting: deque[_Page] = deque()
        self._lending = threading.Lock()
        self._lent = 0  # slots that wait to be stored; half of the hub at most, so that fetches find some

    def follow(self) -> bool:
        """Read what the journal has to say; whether there was anything. Changes of a nonce must not run meanwhile."""
        if self._which == "none":
            return False
        batch = self._journal.read(self._cursor, 256)
        if batch.lost:
            batch = self._journal.dump()
            for known in (self._names, self._known, self._once):
                known.clear()
            self._apply(batch, first=None)
        else:
            self._apply(batch, batch.cursor - len(batch.op))
        moved = batch.cursor != self._cursor
        self._cursor = batch.cursor
        return self._find_hits() or moved if self._which == "second" else moved

    def _find_hits(self) -> bool:
        """What requests that ended had found in the pool waits to be stored; whether there were any requests."""
        found, _, lost = self._journal.releases(self._releases)
        known = [release for release in found if release.at <= self._cursor]  # `at` grows
        self._releases += lost + len(known)
        size = self._layout.page_size
        for release in known:
            tokens = release.tokens[: release.num_cached // size * size]
            for seen in self._keys.seen(tokens, release.namespace):
                for key in seen.keys:
                    if (page := self._once.pop(key, None)) is not None:
                        self._wait(page)
        return bool(known)

    def _apply(self, batch: Batch, first: int | None) -> None:
        """Keep the keys of what is in the tree. What is new waits to be stored; a dump has no numbers to check by."""
        for i, (op, page) in enumerate(zip(batch.op.tolist(), batch.page.tolist(), strict=True)):
            if op == NAMESPACE:
                self._names[int(batch.root[i])] = batch.names[i]
            elif op == STORED:
                tokens, parent = batch.tokens[i], int(batch.parent[i])
                root = int(batch.root[i])  # -1: its namespace is its parent's
                before = self._known[parent] if parent >= 0 else self._keys.root(self._names[root])
                made = self._known[page] = self._keys.after(before, tokens, self._names.get(root))
                if first is not None:
                    text = tokens.astype("<i4").tobytes()
                    self._is_new(_Page(page, first + i, made.key, before.key, made.tag, text))
            else:
                self._once.pop(self._known.pop(page).key, None)

    def _is_new(self, page: _Page) -> None:
        if self._which == "second":
            self._once[page.key] = page
        else:
            self._wait(page)

    def _wait(self, page: _Page) -> None:
        if len(self._waiting) < _BACKLOG:
            self._waiting.append(page)
        else:
            self.skipped += 1

    def copy(self, known: Callable[[bytes], bool]) -> list[tuple[int, Record]]:
        """Slots with whole records of pages that nobody has yet. Give each back with `stored`."""
        copied: list[tuple[int, _Page]] = []
        records: list[tuple[int, Record]] = []
        while self._waiting and len(copied) + len(records) < _BATCH:
            page = self._waiting.popleft()
            if known(page.key):
                continue
            found = self._hub.find(page.key)  # another tier's: no copy is needed
            slot = self._lend() if found is None else found
            if slot is None:
                self._waiting.appendleft(page)
                break
            if found is not None:
                with self._lending:
                    self._lent += 1
                records.append((slot, self._record(slot, page)))
                continue
            copied.append((slot, page))
        if copied:
            rows = [self._hub.memory[slot, : self._layout.page_bytes] for slot, _ in copied]
            self._pages.read_pages(np.array([page.page for _, page in copied], np.int32), rows)
        return records + self._seal(copied)

    def _lend(self) -> int | None:
        slot = self._hub.take() if self._lent < max(1, self._hub.num_slots // 2) else None
        if slot is not None:
            with self._lending:
                self._lent += 1
        return slot

    def _seal(self, copied: list[tuple[int, _Page]]) -> list[tuple[int, Record]]:
        """Make records of the copies of pages that were there all the time."""
        still = self._journal.still([p.page for _, p in copied], [p.number for _, p in copied])
        records = []
        for (slot, page), right in zip(copied, still, strict=True):
            if not right:
                self.discarded += 1
                self.stored(slot)
                continue
            self._layout.seal(self._hub.memory[slot], page.key, page.parent)
            self._hub.name(slot, page.key)
            records.append((slot, self._record(slot, page)))
        return records

    def _record(self, slot: int, page: _Page) -> Record:
        return Record(page.key, page.parent, page.tag, page.tokens, self._hub.memory[slot])

    def stored(self, slot: int) -> None:
        with self._lending:
            self._lent -= 1
        self._hub.let_go(slot)

    @property
    def waiting(self) -> int:
        return len(self._waiting)
