"""What a directory of the disk tier holds, and whether all of it is whole. Reads only, also beside a writer."""

from __future__ import annotations

import fcntl
import json
import mmap
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from radixkv.errors import InvalidArgument
from radixkv.tiers.index import Index, Row
from radixkv.tiers.record import Layout
from radixkv.tiers.slabs import Slabs

__all__ = ["Holding", "holdings", "verify"]

_BATCH = 32


@dataclass(frozen=True)
class Holding:
    """The pages of one identity."""

    folder: Path
    identity: dict[str, Any]
    num_pages: int
    num_tokens: int
    num_bytes: int  #: of these pages
    file_bytes: int  #: that the files of pages take
    namespaces: dict[str, int]  #: pages by tag; names are not stored
    age: float  #: seconds since a page was stored
    in_use: bool  #: whether a process writes to it now
    error: str = ""  #: why it cannot be read


def holdings(directory: Path) -> list[Holding]:
    """What lies in a directory, by identity, that written last first.

    Raises:
        InvalidArgument: it is no directory of a disk tier.
    """
    found = [path.parent for path in directory.glob("*/meta.json") if len(path.parent.name) == 32]
    if not found:
        raise InvalidArgument(f"{directory} holds no pages: give what TierOptions(disk=) was given")
    return sorted(map(_holding, found), key=lambda holding: holding.age)


def _holding(folder: Path) -> Holding:
    identity = json.loads((folder / "meta.json").read_text())
    files = [path.stat() for path in folder.glob("pages-*.bin")]
    written = max((file.st_mtime for file in files), default=(folder / "meta.json").stat().st_mtime)
    rows: list[Row] = []
    stride, error = 0, ""
    try:
        index = Index(folder / "index.sqlite", read_only=True)
        try:
            rows, stride = list(index.rows()), _layout(folder, identity, index).stride
        finally:
            index.close()
    except sqlite3.Error as failure:
        error = str(failure)
    tags = Counter(row.tag.hex() for row in rows)
    return Holding(
        folder, identity, len(rows), len(rows) * int(identity["page_size"]), len(rows) * stride,
        sum(file.st_blocks * 512 for file in files), dict(tags.most_common()), max(0.0, time.time() - written),
        _in_use(folder), error,
    )  # fmt: skip


def _layout(folder: Path, identity: dict[str, Any], index: Index) -> Layout:
    return Layout(index.setting("page_bytes"), int(identity["page_size"]), bytes.fromhex(folder.name))


def _in_use(folder: Path) -> bool:
    with open(folder / "lock", "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False  # closing lets go


def verify(holding: Holding, progress: Callable[[int], object] = lambda done: None) -> list[str]:
    """Read every record; the keys of those that are not whole, as hex. What a writer changes meanwhile does not count.

    Raises:
        sqlite3.Error: the index cannot be read.
    """
    index = Index(holding.folder / "index.sqlite", read_only=True)
    try:
        layout = _layout(holding.folder, holding.identity, index)
        slabs = Slabs(holding.folder, layout.stride, index.setting("slots_per_file"), read_only=True)
        try:
            return _damaged(index, layout, slabs, progress)
        finally:
            slabs.close()
    finally:
        index.close()


def _damaged(index: Index, layout: Layout, slabs: Slabs, progress: Callable[[int], object]) -> list[str]:
    memory = np.frombuffer(mmap.mmap(-1, _BATCH * layout.stride), np.uint8).reshape(_BATCH, layout.stride)
    rows = iter(sorted(index.rows(), key=lambda row: row.slot))
    damaged, done = [], 0
    while batch := list(islice(rows, _BATCH)):
        for row in _unlike(batch, layout, slabs, list(memory)):
            if index.slot(row.key) == row.slot and _unlike([row], layout, slabs, list(memory)):
                damaged.append(row.key.hex())
        done += len(batch)
        progress(done)
    return damaged


def _unlike(rows: list[Row], layout: Layout, slabs: Slabs, memory: list[np.ndarray]) -> list[Row]:
    """The rows whose records are not what they should be."""
    try:
        slabs.read([row.slot for row in rows], memory[: len(rows)])
    except OSError:
        if len(rows) == 1:
            return rows
        return [row for row in rows if _unlike([row], layout, slabs, memory)]
    return [row for row, record in zip(rows, memory, strict=False) if not layout.intact(record, row.key, row.parent)]
