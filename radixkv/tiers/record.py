"""The record of a page, the same bytes in RAM, on disk and elsewhere: payload, zeros, and a trailer of 64 bytes.

     0  8s   b"RKVPAGE1"       8  u32 payload bytes     12  u32 tokens
    16  16s  key              32  16s parent key (the namespace's tag for a first page)
    48  u64  zero             56  u64 XXH3-64 of everything before, seeded with the identity's fingerprint

A record is a multiple of 4096 bytes, as direct I/O wants it, with the trailer at its end.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

__all__ = ["BLOCK", "Bytes", "Layout", "Record"]

Bytes = npt.NDArray[np.uint8]
BLOCK = 4096
_MAGIC = b"RKVPAGE1"
_TRAILER = struct.Struct("<8sII16s16sQ")
_SUM = struct.Struct("<Q")


@dataclass(frozen=True)
class Record:
    """A page to be stored."""

    key: bytes
    parent: bytes
    tag: bytes
    tokens: bytes  #: int32, little endian
    memory: Bytes  #: [stride]


class Layout:
    """How large records are, and whether one is whole and the one that was asked for."""

    def __init__(self, page_bytes: int, page_size: int, fingerprint: bytes) -> None:
        self.page_bytes, self.page_size = page_bytes, page_size
        self.stride = -(-(page_bytes + _TRAILER.size + _SUM.size) // BLOCK) * BLOCK
        self.seed = int.from_bytes(fingerprint[:8], "little")

    def seal(self, memory: Bytes, key: bytes, parent: bytes) -> None:
        """Write the trailer behind a payload."""
        trailer = _TRAILER.pack(_MAGIC, self.page_bytes, self.page_size, key, parent, 0)
        memory[-64:-8] = np.frombuffer(trailer, np.uint8)
        memory[-8:] = np.frombuffer(_SUM.pack(xxh3_64_intdigest(memory[:-8].data, self.seed)), np.uint8)

    def intact(self, memory: Bytes, key: bytes, *parents: bytes) -> bool:
        """Whether this is the record of that page, after one of these, and every bit of it as it was written."""
        expected = [_TRAILER.pack(_MAGIC, self.page_bytes, self.page_size, key, parent, 0) for parent in parents]
        if memory[-64:-8].tobytes() not in expected:
            return False
        return bool(_SUM.unpack(memory[-8:].tobytes())[0] == xxh3_64_intdigest(memory[:-8].data, self.seed))
