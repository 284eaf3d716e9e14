"""Loader: brings the pages of fetches from the stores into the hub, each once, however many wait for it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from radixkv.tiers.fetch import Fetch
from radixkv.tiers.hub import Hub
from radixkv.tiers.planner import Planner
from radixkv.tiers.record import Layout
from radixkv.tiers.shelf import Shelf
from radixkv.tiers.store import Store

__all__ = ["Loader"]

_CHUNK = 8  # pages of a read: small enough for several threads to share a prompt's


class Loader:
    """Safe to call from any thread.

    Args:
        shelves: the stores, in the order in which they are asked.
        timed: whether there are threads that load: then a store that takes longer than computing is not asked to.
    """

    def __init__(self, hub: Hub, layout: Layout, shelves: Sequence[Shelf], planner: Planner, timed: bool) -> None:
        self.page_size = layout.page_size
        self.counts = {"ready": 0, "late": 0, "declined": 0}
        self._hub, self._layout, self._shelves, self._planner, self._timed = hub, layout, shelves, planner, timed
        self._lock = threading.RLock()  # fetches and loads; reentrant, since a fetch may be dropped anywhere
        self._loading: dict[bytes, list[tuple[Fetch, int]]] = {}
        self._abandoned: deque[list[int | None]] = deque()

    def begin(self, fetch: Fetch) -> None:
        """Look in RAM at once; the stores are asked in their own threads."""
        with self._lock:
            fetch.pending += 1
            at = fetch.first
            while at < len(fetch.slots) and self._in_ram(fetch, at):
                at += 1
            self._ask(fetch, at, 0)
            self._one_less(fetch)

    def _ask(self, fetch: Fetch, at: int, shelf: int) -> None:
        """Let the next store that may be asked look for the pages from `at` on."""
        while shelf < len(self._shelves) and not self._shelves[shelf].breaker.allow():
            shelf += 1
        if at < len(fetch.slots) and shelf < len(self._shelves):
            fetch.pending += 1
            fetch.asked.add(shelf)
            self._shelves[shelf].reads.put(lambda: self._locate(fetch, at, shelf))

    def _locate(self, fetch: Fetch, at: int, number: int) -> None:
        """A job: what of the pages from `at` on a store has is read; the next store is asked for the rest."""
        shelf = self._shelves[number]
        found = 0
        if not fetch.finished:
            with shelf.attempt():
                found = self._leading(shelf.store, fetch, at)
                shelf.store.touch(fetch.path(at + found))
        if found and fetch.planned and self._timed and not self._planner.worth(shelf.store.name):
            found = 0
            self.counts["declined"] += 1
        with self._lock:
            end = at + found
            new = [i for i in range(at, end) if not self._joined(fetch, i)]
            for i in range(0, len(new), _CHUNK):
                self._load(fetch, new[i : i + _CHUNK], shelf)
            if not fetch.finished:
                self._ask(fetch, end, number + 1)
            self._one_less(fetch)

    @staticmethod
    def _leading(store: Store, fetch: Fetch, at: int) -> int:
        """How many pages a store has from `at` on: what the top namespace published, then what those below it did."""
        end = at
        for level, seen in enumerate(fetch.seen):
            if rest := seen.keys[end:]:
                found = min(max(0, int(store.leading(rest))), len(rest))
                fetch.level[end : end + found] = [level] * found
                end += found
        return end - at

    def _in_ram(self, fetch: Fetch, i: int) -> bool:
        """Whether a page is in RAM; the fetch has it then."""
        for level, seen in enumerate(fetch.seen):
            if (slot := self._hub.find(seen.keys[i])) is not None:
                fetch.level[i] = level
                self._arrived(fetch, i, slot, "ram")
                return True
        return False

    def _joined(self, fetch: Fetch, i: int) -> bool:
        """Whether a page is in RAM meanwhile, or on its way for another fetch."""
        if self._in_ram(fetch, i):
            return True
        if (waiting := self._loading.get(fetch.key(i))) is None:
            return False
        waiting.append((fetch, i))
        fetch.pending += 1
        return True

    def _load(self, fetch: Fetch, pages: list[int], shelf: Shelf) -> None:
        """Have a run of pages read, as far as there are slots."""
        taken = []
        for i in pages:
            if (slot := self._hub.take()) is None:
                break
            taken.append((i, slot))
            self._loading[fetch.key(i)] = [(fetch, i)]
            fetch.pending += 1
        if taken:
            keys = [fetch.key(i) for i, _ in taken]
            parents = [fetch.parents(i) for i, _ in taken]
            slots = [slot for _, slot in taken]
            shelf.reads.put(lambda: self._read(shelf, keys, parents, slots))

    def _read(self, shelf: Shelf, keys: list[bytes], parents: list[list[bytes]], slots: list[int]) -> None:
        """A job: read records, and check each."""
        memory = [self._hub.memory[slot] for slot in slots]
        read = [False] * len(keys)
        with shelf.attempt():
            there = shelf.store.read(keys, memory)
            records = zip(there, memory, keys, parents, strict=True)
            read = [bool(r) and self._layout.intact(m, k, *p) for r, m, k, p in records]
            if damaged := [k for k, r, good in zip(keys, there, read, strict=True) if r and not good]:
                shelf.counts["corrupt"] += shelf.store.drop(damaged)
        with self._lock:
            for key, slot, good in zip(keys, slots, read, strict=True):
                shelf.counts["read"] += bool(good)
                if good:
                    self._hub.name(slot, key)
                for fetch, i in self._loading.pop(key):
                    if good and (found := self._hub.find(key)) is not None:
                        self._arrived(fetch, i, found, shelf.store.name)
                    self._one_less(fetch)
                self._hub.let_go(slot)

    def _arrived(self, fetch: Fetch, i: int, slot: int, source: str) -> None:
        if fetch.finished:
            self._hub.let_go(slot)
            return
        fetch.slots[i], fetch.where[i] = slot, source
        fetch.sources[source] = fetch.sources.get(source, 0) + self.page_size

    def _one_less(self, fetch: Fetch) -> None:
        fetch.pending -= 1
        if fetch.pending == 0:
            self.settle(fetch, late=False)

    def settle(self, fetch: Fetch, late: bool) -> None:
        """Nothing that comes from now on counts."""
        with self._lock:
            if fetch.finished:
                return
            self.counts["late" if late else "ready"] += 1
            end = fetch.first + fetch.num_pages
            self._let_go(fetch, end)
            fetch.finish()
        self._learn(fetch)
        if late:
            for number in fetch.asked:  # one of them keeps it waiting
                self._shelves[number].breaker.failed()

    def _learn(self, fetch: Fetch) -> None:
        for source, tokens in fetch.sources.items():
            if source != "ram":
                self._planner.loaded(source, tokens * self._layout.page_bytes // self.page_size, fetch.seconds)

    def abandon(self, fetch: Fetch) -> None:
        """From a destructor, which may run in the middle of anything: no lock is taken."""
        self._abandoned.append(fetch.slots)

    def reap(self) -> None:
        """Give back the slots of fetches that were dropped."""
        while self._abandoned:
            for slot in self._abandoned.popleft():
                if slot is not None:
                    self._hub.let_go(slot)

    def let_go(self, fetch: Fetch) -> None:
        """Give a fetch's slots back."""
        with self._lock:
            self._let_go(fetch, 0)

    def _let_go(self, fetch: Fetch, begin: int) -> None:
        for i in range(begin, len(fetch.slots)):
            if (slot := fetch.slots[i]) is not None:
                self._hub.let_go(slot)
                fetch.slots[i] = None
