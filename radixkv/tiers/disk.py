"""The disk tier: records in slab files, found by an index, bounded, least recently used first out."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import sys
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from radixkv.errors import InvalidArgument
from radixkv.tiers.index import Index, Row
from radixkv.tiers.record import Bytes, Layout, Record
from radixkv.tiers.slabs import Slabs

__all__ = ["Disk", "secret_of"]


_TRIES = 3


class _Place(NamedTuple):
    slot: int
    parent: bytes


def secret_of(directory: Path) -> bytes:
    """The secret of a directory: 32 random bytes, made when they are first asked for."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path, part = directory / "secret", directory / f"secret.{os.getpid()}"
    if not path.exists():
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(os.urandom(32))
            os.fsync(file.fileno())
        try:
            os.link(part, path)  # whole, and only one process's
        except FileExistsError:
            pass
        finally:
            part.unlink()
    secret = path.read_bytes()
    if len(secret) != 32:
        raise InvalidArgument(f"{path} has {len(secret)} bytes, not 32: remove the directory to begin anew")
    return secret


class Disk:
    """Pages of one identity in a folder of their own. One process writes; a second one reads.

    A row is committed after its record is on the disk, and a slot is written only after its old row is gone. So after
    kill -9 every row's record is there. After a loss of power a row may be back whose slot holds another record, which
    the key and the checksum in each record tell.

    Raises:
        OSError, sqlite3.Error: the folder cannot be used.
    """

    name = "disk"

    def __init__(
        self, directory: Path, identity: Mapping[str, Any], fingerprint: bytes, layout: Layout, capacity: int
    ) -> None:
        if sys.platform != "linux":
            raise OSError(f"the disk tier needs Linux, this is {sys.platform}")
        self.folder = directory / fingerprint.hex()
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock_file = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        self.read_only = not _locked(self._lock_file)
        self._check_identity(identity)
        self._index = _index(self.folder / "index.sqlite", self.read_only)
        self.num_slots = capacity // layout.stride
        self._layout = layout
        slots = self._setting("slots_per_file", Slabs.file_slots(capacity, layout.stride))
        self._setting("page_bytes", layout.page_bytes)  # for who reads the files without a pool
        self._slabs = Slabs(self.folder, layout.stride, slots, self.read_only)
        self._lock = threading.Lock()  # the maps; never held while a disk is waited for
        self._writing = threading.Lock()
        self._places: OrderedDict[bytes, _Place] = OrderedDict()  # coldest first; a parent is hotter than its children
        self._touched: dict[bytes, None] = {}  # used since it was last written down; `_load` puts those before hotter
        self._dropped: set[bytes] = set()  # damaged: not here, though their rows still are
        self._free: list[int] = []
        self._used = 0
        if not self.read_only:
            self._load()

    def _setting(self, name: str, ours: int) -> int:
        return self._index.setting(name, None if self.read_only else ours)

    def _check_identity(self, identity: Mapping[str, Any]) -> None:
        path = self.folder / "meta.json"
        if path.exists():
            if json.loads(path.read_text()) != dict(identity):
                raise OSError(f"{path} is of another identity: remove that folder")
        elif not self.read_only:
            part = path.with_suffix(".part")
            part.write_text(json.dumps(identity, sort_keys=True, indent=1) + "\n")
            part.replace(path)

    def _load(self) -> None:
        """The index in RAM: parents before children among the hot ones, whatever became of the last writes."""
        rows = {row.key: row for row in self._index.rows()}
        lost = [row.key for row in rows.values() if row.slot >= min(self._slabs.num_slots, self.num_slots)]
        for key in lost:
            del rows[key]
        if lost:
            self._index.change(lost, (), ())
        hottest_first: dict[bytes, Row] = {}
        for row in rows.values():
            path = []
            at: Row | None = row
            while at is not None and at.key not in hottest_first:
                path.append(at)
                at = rows.get(at.parent)
            hottest_first.update((r.key, r) for r in reversed(path))
        for row in reversed(hottest_first.values()):
            self._places[row.key] = _Place(row.slot, row.parent)
        self._used = max((row.used for row in rows.values()), default=0)
        taken = {row.slot for row in rows.values()}
        self._free = [s for s in range(min(self._slabs.num_slots, self.num_slots)) if s not in taken][::-1]

    # --- lookups ----------------------------------------------------------------------------------------------------

    def __contains__(self, key: bytes) -> bool:
        return self._slot(key) is not None

    def __len__(self) -> int:
        return len(self._places)

    def leading(self, keys: Sequence[bytes]) -> int:
        """How many of these pages, from the first on, are here."""
        return next((i for i, key in enumerate(keys) if key not in self), len(keys))

    def _slot(self, key: bytes) -> int | None:
        if self.read_only:
            return self._index.slot(key)
        with self._lock:
            place = None if key in self._dropped else self._places.get(key)
        return None if place is None else place.slot

    def read(self, keys: Sequence[bytes], memory: Sequence[Bytes]) -> list[bool]:
        """Read records; who asked checks them. False: not here."""
        found = [(i, slot) for i, key in enumerate(keys) if (slot := self._slot(key)) is not None]
        self._slabs.read([slot for _, slot in found], [memory[i] for i, _ in found])
        here = {i for i, _ in found}
        return [i in here for i in range(len(keys))]

    def touch(self, keys: Sequence[bytes]) -> None:
        """Pages from a first one on were used."""
        if self.read_only:
            return
        with self._lock:
            known = [key for key in reversed(keys) if key in self._places]
            for key in known:
                self._places.move_to_end(key)
            self._note(known[:1])

    def _note(self, keys: Sequence[bytes]) -> None:
        """These were used last; the index learns of it with the next pages."""
        for key in keys:
            self._touched.pop(key, None)
            self._touched[key] = None

    def drop(self, keys: Sequence[bytes]) -> int:
        """These records are not what they should be; returns how many were still thought to be here."""
        with self._lock:
            known = [key for key in keys if key in self._places and key not in self._dropped]
            self._dropped.update(known)
            return len(known) if not self.read_only else len(keys)

    # --- writes -----------------------------------------------------------------------------------------------------

    def write(self, records: Sequence[Record]) -> list[bool]:
        """Store pages, parents before children; whether each is here now. Raises OSError, sqlite3.Error."""
        if self.read_only:
            return [False] * len(records)
        with self._writing:
            new = self._make_room(records)
            slots = [slot for _, slot in new]
            try:
                self._slabs.write(slots, [record.memory for record, _ in new])
                self._add(new)
            except BaseException:
                with self._lock:
                    self._free += slots
                raise
        return [record.key in self for record in records]

    def _make_room(self, records: Sequence[Record]) -> list[tuple[Record, int]]:
        """A slot for each page that is not here yet, as far as there are any."""
        self._forget_dropped()
        with self._lock:
            path = self._heat(records)
            self._note([record.key for record in records if record.key in self._places])
            wanted = [record for record in {r.key: r for r in records}.values() if record.key not in self._places]
            while len(self._free) < len(wanted) and (more := self._slabs.grow(self.num_slots - self._slabs.num_slots)):
                end = self._slabs.num_slots
                self._free = list(range(end - more, end))[::-1] + self._free
            victims: list[bytes] = []
            for key in self._places:
                if len(self._free) + len(victims) >= len(wanted) or key in path:
                    break
                victims.append(key)
        self._remove(victims)
        with self._lock:
            return [(record, self._free.pop()) for record in wanted[: len(self._free)]]

    def _heat(self, records: Sequence[Record]) -> set[bytes]:
        """Makes the pages before these the hottest, children before parents; returns them."""
        seen: set[bytes] = set()
        paths = [self._path(r.key if r.key in self._places else r.parent, seen) for r in reversed(records)]
        for path in reversed(paths):  # a page that several lead to comes with the last of these
            for key in path:
                self._places.move_to_end(key)
        return seen

    def _path(self, key: bytes, seen: set[bytes]) -> list[bytes]:
        """A page and those before it, as far as they are here and were not seen."""
        path = []
        while key not in seen and (place := self._places.get(key)) is not None:
            path.append(key)
            seen.add(key)
            key = place.parent
        return path

    def _forget_dropped(self) -> None:
        with self._lock:
            dropped = [key for key in self._dropped if key in self._places]
            self._dropped.clear()
        self._remove(dropped)

    def _remove(self, keys: Sequence[bytes]) -> None:
        """Rows out, and committed; only then are their slots free."""
        if not keys:
            return
        self._index.change(keys, (), ())
        with self._lock:
            for key in keys:
                self._free.append(self._places.pop(key).slot)
                self._touched.pop(key, None)

    def _add(self, new: Sequence[tuple[Record, int]]) -> None:
        with self._lock:
            touched = list(self._touched)
            self._touched.clear()
        used = [(self._next(), key) for key in touched]
        rows = [Row(r.key, slot, r.parent, r.tag, r.tokens, 0) for r, slot in reversed(new)]
        rows = [row._replace(used=self._next()) for row in rows]
        self._index.change((), rows, used)
        with self._lock:
            for row in rows:
                self._places[row.key] = _Place(row.slot, row.parent)
            self._heat([record for record, _ in new])

    def _next(self) -> int:
        self._used += 1
        return self._used

    # --- the rest ---------------------------------------------------------------------------------------------------

    def nonces(self) -> dict[bytes, bytes]:
        return self._index.nonces()

    def set_nonce(self, name: bytes, nonce: bytes) -> None:
        """On the disk when this returns."""
        if not self.read_only:
            self._index.set_nonce(name, nonce)

    def check(self) -> None:
        """Recompute; AssertionError if anything is wrong."""
        with self._lock:
            rows = {row.key: row for row in self._index.rows()}
            assert {key: place.slot for key, place in self._places.items()} == {k: r.slot for k, r in rows.items()}
            slots = [place.slot for place in self._places.values()] + self._free
            assert sorted(slots) == list(range(min(self._slabs.num_slots, self.num_slots)))
            order = {key: i for i, key in enumerate(self._places)}
            assert all(order[p.parent] > order[key] for key, p in self._places.items() if p.parent in order)

    def close(self) -> None:
        with self._writing:
            if not self.read_only:
                self._forget_dropped()
                self._add(())
            self._index.close()
            self._slabs.close()
            os.close(self._lock_file)


def _locked(file: int) -> bool:
    for _ in range(_TRIES):  # `radixkv tiers` tries for a moment whether it is locked
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        else:
            return True
    return False


def _index(path: Path, read_only: bool) -> Index:
    """The index; one that is damaged is set aside."""
    try:
        return Index(path, read_only)
    except sqlite3.DatabaseError as error:
        if read_only or isinstance(error, sqlite3.OperationalError):
            raise
        for suffix in ("", "-wal", "-shm"):
            old = path.with_name(path.name + suffix)
            if old.exists():
                old.replace(path.with_name(f"damaged-{path.name}{suffix}"))
        warnings.warn(f"{path} is damaged ({error}): the disk tier begins anew", RuntimeWarning, stacklevel=4)
        return Index(path, read_only)
