"""A snapshot: the tree and its pages in one safetensors file, which any reader of that format can read.

    kv         U8  [pages, bytes of a page]
    tokens     I32 [pages, page_size]     length     I32 [pages], below page_size for an open page
    parent     I32 [pages], -1: none      namespace  I32 [pages], an index into the names
    sum        U64 [pages], XXH3-64 of the bytes, seeded with the identity's fingerprint
    check      U64 [1], the same of the header and of all tensors but kv
    metadata   format, identity (JSON), namespaces (JSON)

The page used last comes first. A parent is always used after its children, so it comes before them, and the first n
pages of a file are the n pages to keep. Data begin at a multiple of 4096 bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from radixkv.cache import PrefixCache
from radixkv.errors import InvalidArgument, LeaseError
from radixkv.tiers.identity import Keys, Named, canonical, difference
from radixkv.tiers.record import BLOCK, Bytes, Layout, Record
from radixkv.tiers.store import PageStore

__all__ = ["Snapshot", "SnapshotStore", "save"]

_FORMAT = "radixkv-snapshot-1"
_BATCH = 16
_DTYPES = {"U8": np.uint8, "I32": np.int32, "U64": np.uint64}
_LARGEST_HEADER = 1 << 30


class _Page(NamedTuple):
    page: int
    tokens: npt.NDArray[np.int32]
    parent: int  # the page before; -1 for a first one
    namespace: str


def save(path: Path, identity: Mapping[str, Any], layout: Layout, cache: PrefixCache, pages: PageStore) -> None:
    """Write the tree and its pages; the file appears whole, or not at all.

    Raises:
        LeaseError: the cache changed meanwhile. OSError: it cannot be written.
    """
    before = cache.stats()
    found = _hottest_first(cache)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            _write(file, found, identity, layout, pages)
            file.flush()
            os.fsync(file.fileno())
        if cache.stats() != before:
            raise LeaseError(
                "the cache changed while it was saved: save between steps, and let nobody use it meanwhile"
            )
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _hottest_first(cache: PrefixCache) -> list[_Page]:
    """All pages of the tree, that used last first."""
    place = {page: i for i, page in enumerate(cache._coldest_first().tolist())}
    size, nodes = cache.page_size, []
    stack = [(root["namespace"], -1, 0, node) for root in cache.snapshot() for node in root["children"]]
    while stack:
        namespace, parent, depth, node = stack.pop()
        namespace = node.get("namespace", namespace)  # one below its parent's, in a hierarchical cache
        own = node["pages"].tolist()
        run = [
            _Page(page, node["tokens"][i * size : (i + 1) * size], own[i - 1] if i else parent, namespace)
            for i, page in enumerate(own)
        ]
        nodes.append((place.get(own[-1], len(place)), -depth, run))  # what is in use now is hotter than all else
        stack += [(namespace, own[-1], depth + 1, child) for child in node["children"]]
    return [page for _, _, run in sorted(nodes, key=lambda node: node[:2], reverse=True) for page in run]


def _write(
    file: BinaryIO, found: Sequence[_Page], identity: Mapping[str, Any], layout: Layout, pages: PageStore
) -> None:
    n, size = len(found), layout.page_size
    names = {name: i for i, name in enumerate(dict.fromkeys(page.namespace for page in found))}
    at = {page.page: i for i, page in enumerate(found)}
    tokens = np.zeros((n, size), np.int32)
    for i, page in enumerate(found):
        tokens[i, : len(page.tokens)] = page.tokens
    columns: dict[str, npt.NDArray[Any]] = {
        "tokens": tokens,
        "length": np.array([len(page.tokens) for page in found], np.int32),
        "parent": np.array([at.get(page.parent, -1) for page in found], np.int32),
        "namespace": np.array([names[page.namespace] for page in found], np.int32),
        "sum": np.zeros(n, np.uint64),
    }
    metadata = {"format": _FORMAT, "identity": canonical(identity).decode(), "namespaces": json.dumps(list(names))}
    header = _header(metadata, (n, layout.page_bytes), {**columns, "check": np.zeros(1, np.uint64)})
    file.write(header)
    for i in range(0, n, _BATCH):
        ids = np.array([page.page for page in found[i : i + _BATCH]], np.int32)
        out = np.empty((len(ids), layout.page_bytes), np.uint8)
        pages.read_pages(ids, list(out))
        columns["sum"][i : i + len(ids)] = [_sum(row, layout.seed) for row in out]
        file.write(out.data)
    rest = b"".join(column.tobytes() for column in columns.values())
    file.write(rest + struct.pack("<Q", _sum(np.frombuffer(header + rest, np.uint8), layout.seed)))


def _header(metadata: dict[str, str], kv: tuple[int, int], columns: Mapping[str, npt.NDArray[Any]]) -> bytes:
    names = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
    shapes = {"kv": ("U8", kv, kv[0] * kv[1])} | {
        name: (names[column.dtype], column.shape, column.nbytes) for name, column in columns.items()
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape, nbytes) in shapes.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-(8 + len(text)) // BLOCK) * BLOCK - 8)
    return struct.pack("<Q", len(text)) + text


def _sum(payload: Bytes, seed: int) -> int:
    return xxh3_64_intdigest(payload.data, seed)


class Snapshot:
    """An open file. Its pages are read when they are asked for.

    Raises:
        InvalidArgument: it is no snapshot, or of another identity: says what differs. OSError: it cannot be read.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], layout: Layout) -> None:
        self._layout = layout
        self._file = os.open(path, os.O_RDONLY)
        try:
            self._read_header(path, identity)
        except (ValueError, KeyError, TypeError, struct.error) as error:
            self.close()
            if isinstance(error, InvalidArgument):
                raise
            raise InvalidArgument(f"{path} is no snapshot, or damaged ({error}): save it anew") from error

    def _read_header(self, path: Path, identity: Mapping[str, Any]) -> None:
        (length,) = struct.unpack("<Q", os.pread(self._file, 8, 0))
        if length > min(_LARGEST_HEADER, os.fstat(self._file).st_size):
            raise ValueError("its header is longer than the file")
        text = os.pread(self._file, 8 + length, 0)
        header = json.loads(text[8:])
        self._data = len(text)
        metadata = header["__metadata__"]
        if metadata["format"] != _FORMAT:
            raise ValueError(f"its format is {metadata['format']!r}, not {_FORMAT!r}")
        if (theirs := json.loads(metadata["identity"])) != json.loads(canonical(identity)):
            raise InvalidArgument(f"{path} is of another identity: {difference(identity, theirs)}")
        self._check_sum(text, header["kv"]["data_offsets"][1])
        self.names: list[str] = json.loads(metadata["namespaces"])
        self._kv = header["kv"]
        self.tokens, self.length, self.parent, self.namespace, self._sums = (
            self._column(header[name]) for name in ("tokens", "length", "parent", "namespace", "sum")
        )
        self._check()

    def _check_sum(self, header: bytes, begin: int) -> None:
        end = os.fstat(self._file).st_size
        rest = os.pread(self._file, max(0, end - self._data - begin), self._data + begin)
        check = _sum(np.frombuffer(header + rest[:-8], np.uint8), self._layout.seed)
        if struct.pack("<Q", check) != rest[-8:]:
            raise ValueError("its checksum is another")

    def _column(self, entry: Mapping[str, Any]) -> npt.NDArray[Any]:
        begin, end = entry["data_offsets"]
        return np.frombuffer(os.pread(self._file, end - begin, self._data + begin), _DTYPES[entry["dtype"]]).reshape(
            entry["shape"]
        )

    def _check(self) -> None:
        """That what was read makes a tree: whoever loads it walks from parent to parent."""
        n = len(self)
        right = self._kv["shape"] == [n, self._layout.page_bytes] and self.tokens.shape == (n, self._layout.page_size)
        right = right and self.parent.shape == self.length.shape == self.namespace.shape == self._sums.shape == (n,)
        if not right:
            raise ValueError("its tensors do not fit each other")
        if ((self.parent < -1) | (self.parent >= np.arange(n))).any():
            raise ValueError("a page comes before its parent")
        if ((self.namespace < 0) | (self.namespace >= len(self.names))).any():
            raise ValueError("a page is of no namespace")
        full = self.length == self._layout.page_size
        if ((self.length < 1) | (self.length > self._layout.page_size)).any() or not full[
            self.parent[self.parent >= 0]
        ].all():
            raise ValueError("an open page has others after it")

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, page: int, payload: Bytes) -> bool:
        """Read a page's bytes; whether they are those that were saved."""
        offset = self._data + self._kv["data_offsets"][0] + page * self._layout.page_bytes
        if os.preadv(self._file, [payload.data], offset) != len(payload):
            return False
        return _sum(payload, self._layout.seed) == int(self._sums[page])

    def load(self, cache: PrefixCache, pages: PageStore) -> int:
        """Fill a pool with the pages used last, as many as it can take, in their order; the tokens that came.

        Damaged pages and those after them are left out.
        """
        if not cache.hierarchical and self._lower.any():
            raise InvalidArgument("saved by a hierarchical cache: load it in one, with hierarchical=True")
        stats = cache.stats()
        count = min(len(self), stats.free + stats.evictable)
        payload = np.empty(self._layout.page_bytes, np.uint8)
        return sum(self._restore(list(self._path(end)), cache, pages, payload) for end in self._run_ends(count))

    @property
    def _lower(self) -> npt.NDArray[np.bool_]:
        """Of each page, whether it is of another namespace than the one before it."""
        return np.asarray((self.parent >= 0) & (self.namespace != self.namespace[self.parent]), np.bool_)

    def _run_ends(self, count: int) -> Iterator[int]:
        """Of the first `count` pages, those with which runs end, the coldest first: who has used them has used all."""
        for page in reversed(range(count)):
            if page + 1 == count or self.parent[page + 1] != page:
                yield page

    def _path(self, page: int) -> list[int]:
        path = []
        while page >= 0:
            path.append(page)
            page = int(self.parent[page])
        return path[::-1]

    def _restore(self, path: list[int], cache: PrefixCache, pages: PageStore, payload: Bytes) -> int:
        """Bring a path into the tree, or use it if it is there; the tokens gained."""
        size = cache.page_size
        tokens = np.concatenate([self.tokens[page, : self.length[page]] for page in path])
        namespace = self.names[int(self.namespace[path[-1]])]
        if cache.match(tokens, namespace) == len(tokens):
            with contextlib.suppress(MemoryError):  # nearly all of the pool, which no pin may have
                cache.pin(tokens, namespace).unpin()
            return 0
        with cache.acquire(tokens, namespace) as lease:
            written, end = lease.num_written, lease.num_written // size * size
            for i, page in enumerate(path[written // size :], written // size):
                if not self.read(page, payload):
                    break
                pages.write_pages(lease.pages[i : i + 1], [payload])
                end += int(self.length[page])
                lease.advance(end - lease.num_written)
                if (owner := self.names[int(self.namespace[page])]) != namespace:
                    lease._commit_as(owner)
            if lease.num_written == written:  # its first page is damaged: nothing was written
                lease.release(commit=False)
                return 0
            return lease.num_written - written

    def close(self) -> None:
        os.close(self._file)


class SnapshotStore:
    """A snapshot as a tier: its full pages, found by key, read when they are asked for."""

    name = "snapshot"
    read_only = True

    def __init__(self, snapshot: Snapshot, keys: Keys, layout: Layout) -> None:
        self._snapshot, self._layout = snapshot, layout
        roots = [keys.root(name) for name in snapshot.names]
        lower = snapshot._lower
        named: list[Named] = []
        self._pages: dict[bytes, tuple[int, bytes]] = {}  # its row, and its parent's key
        for page in range(len(snapshot)):
            at = int(snapshot.parent[page])
            namespace = int(snapshot.namespace[page])
            before = named[at] if at >= 0 else roots[namespace]
            named.append(keys.after(before, snapshot.tokens[page], snapshot.names[namespace] if lower[page] else None))
            if snapshot.length[page] == layout.page_size:
                self._pages[named[-1].key] = page, before.key

    def __contains__(self, key: bytes) -> bool:
        return key in self._pages

    def leading(self, keys: Sequence[bytes]) -> int:
        return next((i for i, key in enumerate(keys) if key not in self._pages), len(keys))

    def read(self, keys: Sequence[bytes], memory: Sequence[Bytes]) -> list[bool]:
        return [self._read(key, record) for key, record in zip(keys, memory, strict=True)]

    def _read(self, key: bytes, record: Bytes) -> bool:
        if (found := self._pages.get(key)) is None or not self._snapshot.read(
            found[0], record[: self._layout.page_bytes]
        ):
            self._pages.pop(key, None)
            return False
        record[self._layout.page_bytes :] = 0
        self._layout.seal(record, key, found[1])
        return True

    def touch(self, keys: Sequence[bytes]) -> None:
        """Nothing leaves a snapshot, so nothing need be kept."""

    def drop(self, keys: Sequence[bytes]) -> int:
        return len([self._pages.pop(key) for key in keys if key in self._pages])

    def write(self, records: Sequence[Record]) -> list[bool]:
        return [False] * len(records)

    def close(self) -> None:
        self._snapshot.close()
