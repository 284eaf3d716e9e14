"""The hub: slots in RAM through which every byte between the pool and the tiers passes."""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict

import numpy as np

from radixkv import _core
from radixkv.tiers.record import Bytes

__all__ = ["Hub"]


class Hub:
    """Slots of one record each, aligned for direct I/O. A slot that nobody uses keeps its page until it is needed."""

    def __init__(self, num_slots: int, stride: int) -> None:
        self.num_slots = num_slots
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # the first touch of shared memory takes three times as long
        memory = mmap.mmap(-1, num_slots * stride, flags=private)
        self.memory: Bytes = np.frombuffer(memory, np.uint8).reshape(num_slots, stride)
        _core.prefer_huge_pages(self.memory.ctypes.data, self.memory.nbytes)  # direct I/O then pins a few, not many
        self._lock = threading.Lock()
        self._users = [0] * num_slots
        self._key: list[bytes | None] = [None] * num_slots
        self._slot: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_slots))  # nobody uses them; coldest first

    def take(self) -> int | None:
        """A slot for a new record; None if all are in use. The page that it kept is forgotten."""
        with self._lock:
            if not self._idle:
                return None
            slot, _ = self._idle.popitem(last=False)
            if (key := self._key[slot]) is not None:
                del self._slot[key]
                self._key[slot] = None
            self._users[slot] = 1
            return slot

    def find(self, key: bytes) -> int | None:
        """The slot with this page's record, which has one user more now."""
        with self._lock:
            slot = self._slot.get(key)
            if slot is not None:
                self._users[slot] += 1
                self._idle.pop(slot, None)
            return slot

    def __contains__(self, key: bytes) -> bool:
        with self._lock:
            return key in self._slot

    def name(self, slot: int, key: bytes) -> None:
        """The slot holds this page's whole record: from now on it is found."""
        with self._lock:
            if self._slot.setdefault(key, slot) == slot:
                self._key[slot] = key

    def let_go(self, slot: int) -> None:
        with self._lock:
            self._users[slot] -= 1
            if self._users[slot] == 0:
                self._idle[slot] = None
                if self._key[slot] is None:
                    self._idle.move_to_end(slot, last=False)

    @property
    def num_used(self) -> int:
        """Slots that somebody uses."""
        return self.num_slots - len(self._idle)

    def check(self) -> None:
        """Recompute everything; AssertionError if it is wrong."""
        with self._lock:
            assert set(self._idle) == {slot for slot, users in enumerate(self._users) if users == 0}
            assert min(self._users) >= 0
            assert {key: slot for slot, key in enumerate(self._key) if key is not None} == self._slot
