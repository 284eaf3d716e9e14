"""Slab files: slots of one record each, read and written around the page cache where the file system allows it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from radixkv.tiers.record import Bytes

__all__ = ["Slabs"]

_LARGEST, _SMALLEST, _FILES = 1 << 30, 256 << 20, 64
_MOST_BUFFERS = 64  # of one call; the system allows 1024


class Slabs:
    """`pages-0000.bin` and so on, each allocated whole. Slot s lies in file s // slots_per_file."""

    def __init__(self, folder: Path, stride: int, slots_per_file: int, read_only: bool) -> None:
        self._folder, self._stride, self._read_only = folder, stride, read_only
        self.slots_per_file = slots_per_file
        self._files: list[int] = []
        self.num_slots = 0
        while (path := self._path(len(self._files))).exists():
            self._open(path)
            self.num_slots += os.fstat(self._files[-1]).st_size // stride

    @staticmethod
    def file_slots(capacity: int, stride: int) -> int:
        """Slots of a file: at most 1 GiB of them, and no more than 64 files unless these are of 1 GiB."""
        size = min(_LARGEST, max(_SMALLEST, capacity // _FILES), capacity)
        return max(1, size // stride)

    def grow(self, most: int) -> int:
        """One file more, of up to `most` slots; the slots that came, none where the disk has no room."""
        slots = min(most, self.slots_per_file)
        if slots < 1 or self.num_slots % self.slots_per_file:
            return 0
        path = self._path(len(self._files))
        self._open(path)
        try:
            os.posix_fallocate(self._files[-1], 0, slots * self._stride)
        except OSError:
            os.close(self._files.pop())
            path.unlink()
            return 0
        self.num_slots += slots
        return slots

    def write(self, slots: Sequence[int], records: Sequence[Bytes]) -> None:
        """Write records and wait until the disk has them. Raises OSError."""
        used = set()
        for file, offset, part in self._runs(slots, records):
            if os.pwritev(file, [memory.data for memory in part], offset) != len(part) * self._stride:
                raise OSError("a write came to nothing: the disk is full")
            used.add(file)
        for file in used:
            os.fdatasync(file)
            self._forget(file)

    def read(self, slots: Sequence[int], records: Sequence[Bytes]) -> None:
        """Raises OSError, also where a file is shorter than it should be."""
        for file, offset, part in self._runs(slots, records):
            if os.preadv(file, [memory.data for memory in part], offset) != len(part) * self._stride:
                raise OSError("a file of pages is shorter than it was")
            self._forget(file)

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())

    def _runs(self, slots: Sequence[int], records: Sequence[Bytes]) -> Iterator[tuple[int, int, list[Bytes]]]:
        """(file, offset, records) for each run of neighbouring slots."""
        begin = 0
        for i in range(1, len(slots) + 1):
            joined = i < len(slots) and slots[i] == slots[i - 1] + 1 and slots[i] % self.slots_per_file
            if not joined or i - begin == _MOST_BUFFERS:
                file, place = divmod(slots[begin], self.slots_per_file)
                while file >= len(self._files) and self._read_only and self._path(len(self._files)).exists():
                    self._open(self._path(len(self._files)))  # the writer has added one
                if file >= len(self._files):
                    raise OSError(f"a file of pages is gone: {self._path(file)}")
                yield self._files[file], place * self._stride, list(records[begin:i])
                begin = i

    def _open(self, path: Path) -> None:
        flags = os.O_RDONLY if self._read_only else os.O_RDWR | os.O_CREAT
        try:
            file = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o600)
            self._direct = True
        except OSError:
            file = os.open(path, flags, 0o600)
            self._direct = False
        self._files.append(file)

    def _forget(self, file: int) -> None:
        if not self._direct:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

    def _path(self, number: int) -> Path:
        return self._folder / f"pages-{number:04d}.bin"
