"""Tiers: pages below the pool, in RAM and on disk. The pool and its tree know nothing of them."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from radixkv import _core
from radixkv.cache import Lease, PrefixCache
from radixkv.errors import InvalidArgument
from radixkv.memory import bytes_of
from radixkv.tiers.cache import TieredCache
from radixkv.tiers.disk import Disk, secret_of
from radixkv.tiers.fetch import Fetch
from radixkv.tiers.hub import Hub
from radixkv.tiers.identity import ALL, Keys
from radixkv.tiers.loader import Loader
from radixkv.tiers.planner import Planner
from radixkv.tiers.record import Layout, Record
from radixkv.tiers.shelf import GRACE, Shelf
from radixkv.tiers.snapshot import Snapshot, SnapshotStore, save
from radixkv.tiers.store import PageStore, Store
from radixkv.tiers.writer import Writer

__all__ = ["TierOptions", "Tiers"]

_HUB_PAGES = 256
_POLL = 0.005
_PREFETCH = 60.0  # seconds until a fetch is given up that nobody waits for


@dataclass(frozen=True)
class TierOptions:
    """What lies below the pool.

    Args:
        weights: what tells the K and V of one model from another's: a digest of its weights, such as
            `radixkv.hf.weights_digest(model)`, which `radixkv.hf.engine_for` fills in. An `Engine` needs it.
        disk: a directory that keeps pages over restarts. One process writes to it, others read.
        disk_capacity: what the pages of one identity may take there: "20GiB", or bytes.
        snapshot: a file that `Engine.save` wrote: its pages are read when they are asked for.
        ram: bytes of RAM that pages pass through, and stay in while there is room; 256 pages by default.
        secret: what keys of pages are made with, 1 to 64 bytes; by default the directory's own, made at first.
        write: which pages are stored: "all" that are published; "second", those that a later request found in the
            pool, for disks that wear; "none".
        threads: that read from the disk. 0: nothing happens but in `Tiers.pump`, and nothing goes by the clock.
    """

    weights: str | None = None
    disk: str | Path | None = None
    disk_capacity: str | int = "20GiB"
    snapshot: str | Path | None = None
    ram: str | int | None = None
    secret: bytes | None = None
    write: Literal["all", "second", "none"] = "all"
    threads: int = 4


class Tiers:
    """Stores what a cache publishes, and brings it back for requests that wait.

        fetch = tiers.fetch(prompt)                      # returns at once
        ...                                              # serve others until fetch.ready
        lease = cache.acquire(prompt)
        tiers.fill(lease, fetch)                         # whole pages; the rest is computed as ever

    Stores that are slow, full, broken or gone are misses: nothing here raises because of them.

    Args:
        cache, pages: the bookkeeping, and the memory of its pages.
        identity: all that decides the bytes of a page: model, weights, shape, format, scales, arithmetic. Any
            difference, and nothing is found.
        stores: further stores, asked after the disk.
    """

    def __init__(
        self,
        cache: PrefixCache,
        pages: PageStore,
        identity: Mapping[str, Any],
        options: TierOptions,
        stores: Sequence[Store] = (),
    ) -> None:
        if options.write not in ("all", "second", "none"):
            raise InvalidArgument(f"write is {options.write!r}: give 'all', 'second' or 'none'")
        self.page_size = cache.page_size
        self._cache, self._pages = cache, pages
        self.identity = identity = {**identity, "page_size": cache.page_size, "format": 1}
        self._keys = Keys(identity, _secret(options), cache.page_size, hierarchical=cache.hierarchical)
        self._layout = Layout(pages.page_bytes, cache.page_size, self._keys.fingerprint)
        ram = _HUB_PAGES * self._layout.stride if options.ram is None else bytes_of("ram", options.ram)
        if ram < 2 * self._layout.stride:
            raise InvalidArgument(f"ram is {ram} bytes: two pages take {2 * self._layout.stride}")
        self.hub = Hub(ram // self._layout.stride, self._layout.stride)
        self.disk = self._open_disk(options, identity)
        own: list[Store] = [] if self.disk is None else [self.disk]
        if self.disk is not None:
            self._keys.nonces = self.disk.nonces()
        if options.snapshot is not None:
            own.append(SnapshotStore(self._snapshot(Path(options.snapshot)), self._keys, self._layout))
        self._shelves = [Shelf(store, options.threads) for store in own + list(stores)]
        self._generation = threading.RLock()  # tags: who reads them and who changes them
        self._timed = options.threads > 0
        self._filled = 0
        self.planner = Planner(pages.page_bytes / cache.page_size)
        self.loader = Loader(self.hub, self._layout, self._shelves, self.planner, self._timed)
        self._writer = Writer(cache.journal(), self._keys, self.hub, self._layout, pages, options.write)
        self._copying = threading.Lock()
        self._closed = threading.Event()
        self._worker = threading.Thread(
            target=_work, args=(weakref.ref(self), self._closed), name="radixkv-tiers", daemon=True
        )
        if options.threads:
            self._worker.start()
        if isinstance(cache, TieredCache):
            cache.put_above(self)

    def _open_disk(self, options: TierOptions, identity: Mapping[str, Any]) -> Disk | None:
        if options.disk is None:
            return None
        capacity = bytes_of("disk_capacity", options.disk_capacity)
        if capacity < self._layout.stride:
            raise InvalidArgument(f"disk_capacity is {capacity} bytes: a page takes {self._layout.stride}")
        try:
            return Disk(Path(options.disk), identity, self._keys.fingerprint, self._layout, capacity)
        except (OSError, ValueError, sqlite3.Error) as error:
            warnings.warn(f"the disk tier in {options.disk} is off: {error}", RuntimeWarning, stacklevel=4)
            return None

    @property
    def fingerprint(self) -> bytes:
        """Of the identity: the name of its folder on the disk, as hex."""
        return self._keys.fingerprint

    # --- fetch ------------------------------------------------------------------------------------------------------

    def fetch(self, tokens: _core.Tokens, namespace: str = "", *, deadline: float | None = None) -> Fetch:
        """Begin to bring the pages of a prompt, after those that the pool has, into RAM. Returns at once.

        Nothing is loaded that was faster to compute, as far as both were seen (`planner`).

        Args:
            deadline: seconds until it is ready with what came by then; by default what computing its pages would take.

        Raises:
            InvalidTokens, InvalidArgument: as `PrefixCache.match`.
        """
        fetch = self._made(tokens, namespace, deadline)
        self.loader.begin(fetch)
        return fetch

    def prefetch(self, tokens: _core.Tokens, namespace: str = "") -> Fetch:
        """Bring pages into RAM whatever it takes, and leave them there as the hottest. Nobody need wait or keep it."""
        fetch = self._made(tokens, namespace, _PREFETCH)
        fetch.planned = False
        self.loader.begin(fetch)
        return fetch

    def _made(self, tokens: _core.Tokens, namespace: str, deadline: float | None) -> Fetch:
        first = self._cache.match(tokens, namespace) // self.page_size
        self.loader.reap()
        prompt = np.array(tokens, np.int32)
        with self._generation:
            if self.disk is not None and self.disk.read_only:
                self._refresh_nonces(self.disk)
            full = max(0, len(prompt) - 1) // self.page_size  # a token is left to compute
            seen = self._keys.seen(prompt[: full * self.page_size], namespace)
        first = min(first, full)
        if deadline is None:
            deadline = self.planner.deadline((full - first) * self.page_size) if self._timed else _PREFETCH
        return Fetch(self, prompt, namespace, seen[-1].tag, seen, first, deadline)

    def _refresh_nonces(self, disk: Disk) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._keys.nonces.update(disk.nonces())

    # --- fill -------------------------------------------------------------------------------------------------------

    def fill(self, lease: Lease, fetch: Fetch) -> int:
        """Copy fetched pages into a lease of the same prompt and publish them; the tokens gained, 0 if nothing fits.

        In the thread that owns the lease, between steps. At least one token is left to compute. The fetch's memory is
        free afterwards.

        Raises:
            LeaseError: the lease is released, in a step or another thread's. InvalidArgument: another engine's fetch
            or lease.
        """
        self.check_own(fetch)
        if not lease._of(self._cache):
            raise InvalidArgument(f"{lease!r} is of another cache: fill leases that this engine acquired")
        lease.extend([])  # nothing; refuses a lease that may not change
        self.loader.settle(fetch, late=False)
        try:
            with self._generation:
                return self._fill(lease, fetch)
        finally:
            self.loader.let_go(fetch)

    def check_own(self, fetch: object) -> None:
        """Raises InvalidArgument for what these tiers have not fetched."""
        if not isinstance(fetch, Fetch) or not fetch.of(self):
            raise InvalidArgument(f"{fetch!r} is no fetch of this engine: give what its fetch() returned")

    def _fill(self, lease: Lease, fetch: Fetch) -> int:
        size = self.page_size
        begin, written = lease.num_written // size, lease.num_written
        end = min(fetch.first + fetch.num_pages, (lease.num_tokens - 1) // size)
        if begin < fetch.first or end <= begin or lease.namespace != fetch.namespace:
            return 0
        if self._keys.tag(fetch.namespace) != fetch.tag:  # cleared meanwhile
            return 0
        if not np.array_equal(lease.tokens[: end * size], fetch.prompt[: end * size]):
            return 0
        lease.commit()  # what it computed is of its own namespace, whoever published what follows
        own = lease.pages[begin - lease.num_dropped // size :][: end - begin]
        rows = [self.hub.memory[slot, : self._layout.page_bytes] for slot in fetch.slots[begin:end]]
        self._pages.write_pages(own, rows)
        for i in range(begin, end):
            fetch.restored[fetch.where[i]] = fetch.restored.get(fetch.where[i], 0) + min(size, (i + 1) * size - written)
        for owner, run in groupby(range(begin, end), fetch.owner):
            *_, last = run
            lease.advance((last + 1) * size - lease.num_written)
            lease._commit_as(owner)
        self._filled += end * size - written
        return end * size - written

    # --- writing ----------------------------------------------------------------------------------------------------

    def _write_some(self) -> bool:
        """Follow the journal and copy a batch; whether there was anything."""
        self.loader.reap()
        with self._copying:
            with self._generation:
                moved = self._writer.follow()
            records = self._writer.copy(self._stored_already)
            if records:
                self._store(records, 0)
            return moved or bool(records)

    def _stored_already(self, key: bytes) -> bool:
        shelves = [shelf for shelf in self._shelves if not shelf.store.read_only]
        return all(shelf.has(key) for shelf in shelves) if shelves else key in self.hub

    def _store(self, records: list[tuple[int, Record]], number: int) -> None:
        """Have records written to each store in turn; then their slots are free."""
        if number == len(self._shelves):
            for slot, _ in records:
                self._writer.stored(slot)
            return
        shelf = self._shelves[number]

        def job() -> None:
            if not shelf.store.read_only and shelf.breaker.allow():
                with shelf.attempt():
                    written = sum(shelf.store.write([record for _, record in records]))
                    shelf.counts["written"] += written
                    shelf.counts["refused"] += len(records) - written
            self._store(records, number + 1)

        shelf.writes.put(job)

    def pump(self) -> None:
        """With threads=0: do all that there is to do, in this thread. With threads, these do it."""
        busy = not self._worker.is_alive()
        while busy:
            busy = self._write_some()
            for shelf in self._shelves:
                busy |= shelf.pump()

    # --- snapshots --------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """`Engine.save`."""
        save(Path(path), self.identity, self._layout, self._cache, self._pages)

    def load(self, path: str | Path) -> int:
        """`Engine.load`."""
        with contextlib.closing(self._snapshot(Path(path))) as snapshot:
            return snapshot.load(self._cache, self._pages)

    def _snapshot(self, path: Path) -> Snapshot:
        return Snapshot(path, self.identity, self._layout)

    # --- the rest ---------------------------------------------------------------------------------------------------

    def clear(self, namespace: str | None = None) -> int:
        """`PrefixCache.clear`, in all tiers at once; returns the pool's pages freed.

        Nothing stored so far is found again, nor what is being written. Space comes back as it is needed.
        """
        with self._copying, self._generation:
            while self._writer.follow():  # what was published before belongs to the old nonce
                pass
            freed = PrefixCache.clear(self._cache, namespace)  # not that of a `TieredCache`, which calls this
            while self._writer.follow():
                pass
            name, nonce = ALL if namespace is None else self._keys.base(namespace), os.urandom(16)
            self._keys.nonces[name] = nonce
            if self.disk is not None:
                try:
                    self.disk.set_nonce(name, nonce)
                except (OSError, sqlite3.Error) as error:
                    warnings.warn(
                        f"clear() holds until this process ends, but could not be written: {error}; remove "
                        f"{self.disk.folder}",
                        RuntimeWarning,
                        stacklevel=2,
                    )
        return freed

    def stats(self) -> dict[str, Any]:
        """Counts since it was made: fetches, the hub, and each store."""
        self.loader.reap()
        stores = {s.store.name: s.stats(self.planner) for s in self._shelves}
        if self.disk is not None:
            stores["disk"] |= {"pages": len(self.disk), "capacity": self.disk.num_slots}
        hub = {"slots": self.hub.num_slots, "used": self.hub.num_used}
        writes = {"skipped_writes": self._writer.skipped, "discarded_copies": self._writer.discarded}
        tokens = self.planner.compute.per_second
        return {
            **self.loader.counts,
            "filled_tokens": self._filled,
            **writes,
            "hub": hub,
            "stores": stores,
            "computed_tokens_per_second": tokens,
        }

    def close(self, drain: float = 2.0) -> None:
        """Store what waits, for at most `drain` seconds, and let go of the disk. Before the pool's memory goes."""
        if self._closed.is_set():
            return
        until = time.monotonic() + drain
        self._closed.set()
        if self._worker.is_alive() and self._worker is not threading.current_thread():
            self._worker.join(max(0.0, until - time.monotonic()))
        while (self._write_some() or self._writer.waiting) and time.monotonic() < until:
            for shelf in self._shelves:
                shelf.writes.pump()
            time.sleep(0.001)
        for shelf in self._shelves:
            shelf.close(until)

    def __del__(self) -> None:
        if hasattr(self, "_worker"):
            self.close(drain=GRACE)

    def __enter__(self) -> Tiers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _work(tiers: weakref.ref[Tiers], closed: threading.Event) -> None:
    """The worker: follows the journal until the tiers are closed or nobody has them any more."""
    while not closed.wait(_POLL):
        if (these := tiers()) is None:
            return
        while these._write_some() and not closed.is_set():
            pass
        del these


def _secret(options: TierOptions) -> bytes:
    if options.secret is not None:
        if not 1 <= len(options.secret) <= 64:
            raise InvalidArgument(f"secret has {len(options.secret)} bytes: give 1 to 64")
        return options.secret
    if options.disk is None:
        return os.urandom(32)
    try:
        return secret_of(Path(options.disk))
    except OSError:
        return os.urandom(32)  # the disk tier will say why it is off
