"""The operation log: a cache's journal in a file, to rebuild the cache as it was at any step, and to explain a miss.

    with cache.record("cache.log"):
        serve()
    log = read_log("cache.log")
    log.state(3071), log.diff(3000, 3071), log.explain(tokens)

A step is the number of a journal record: one page stored or removed, in the order in which it happened. The file is a
stream of msgpack maps:

    header    {"radixkv-log": 1, "num_pages": int, "page_size": int}, and of a hierarchical cache "hierarchical": True
    records   {"first": int, "dump": bool, "time": s, "op", "page", "parent", "root", "request", "tokens": bin,
               "names": {index: namespace}}
    lost      {"lost": int}: so many releases were not read in time
    release   {"request", "at", "num_prompt", "num_cached": int, "time": s, "namespace": str, "ids": bin}

Numbers are little-endian, int32 but for "request" (int64) and "op" (uint8); "tokens" are those of STORED records. Of a
dump, which comes first and where records were lost, the records are the tree as it was at step "first". A file that was
cut short is whole up to its last whole map.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from radixkv.errors import InvalidArgument, TraceError
from radixkv.journal import STORED, Batch, Release
from radixkv.journal_story import Story

if TYPE_CHECKING:
    from radixkv.cache import PrefixCache

__all__ = ["LogWriter", "is_log", "read_log"]

VERSION = 1
_MAGIC = "radixkv-log"
_HEADS = tuple(kind + b"\xab" + _MAGIC.encode() for kind in (b"\x83", b"\x84"))  # a map of three or four; its first key
_PERIOD = 0.005  # seconds between two looks at the journal
_LIMIT = 4096  # records of one map
_MOST_BYTES = 2**31 - 1  # of one map; a release is the largest
_COLUMNS = {"op": "u1", "page": "<i4", "parent": "<i4", "root": "<i4", "request": "<i8"}


class LogWriter:
    """Writes a cache's journal to a file. Made by `PrefixCache.record`; ``close`` it, or leave its ``with``.

    A thread reads the journal every few milliseconds, which is how exact the times are. It never disturbs serving: when
    the file cannot be written, recording stops, and ``close`` raises what happened. Where the cache changes faster than
    the journal is read (more than 4 * num_pages pages in 5 ms), the log goes on from a dump of the tree, and steps in
    between are missing (`num_lost` times); who serves requests without computing them calls ``pump`` now and then.
    """

    def __init__(self, cache: PrefixCache, path: str) -> None:
        import msgpack

        self._journal = cache.journal()
        self._pack = msgpack.Packer(use_bin_type=True).pack
        self._path, self._lock, self._closing = path, threading.Lock(), threading.Event()
        self._failure: OSError | None = None
        self.num_steps = self.num_requests = self.num_lost = 0
        self._cursor = self._journal.end
        self._released = self._journal.releases_end
        try:
            self._stream: BinaryIO | None = open(path, "wb")  # noqa: SIM115 (closed by close)
            header = {_MAGIC: VERSION, "num_pages": cache.num_pages, "page_size": cache.page_size}
            if cache.hierarchical:
                header["hierarchical"] = True
            self._stream.write(self._pack(header))
            self._dump()
        except OSError as error:
            raise TraceError(f"cannot write {path}: {error.strerror}: check the folder and its permissions") from error
        self._thread = threading.Thread(target=self._follow, name="radixkv log", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._closing.wait(_PERIOD):
            self.pump()

    def pump(self) -> None:
        """Write down what happened until now. The log's thread does so all the time."""
        with self._lock:
            if self._stream is None or self._failure is not None:
                return
            try:
                self._write_all()
                self._stream.flush()
            except OSError as error:
                self._failure = error

    def _write_all(self) -> None:
        assert self._stream is not None
        while len((batch := self._journal.read(self._cursor, _LIMIT)).op):
            if batch.lost:
                self.num_lost += 1
                self._dump()
                continue
            self._write(batch, self._cursor, dump=False)
            self.num_steps += len(batch.op)
            self._cursor = batch.cursor
        while True:
            releases, self._released, lost = self._journal.releases(self._released)
            if lost:
                self._stream.write(self._pack({"lost": lost}))
            for release in releases:
                self._write_release(release)
            if not releases:
                return

    def _dump(self) -> None:
        batch = self._journal.dump()
        self._write(batch, batch.cursor, dump=True)
        self._cursor = batch.cursor

    def _write(self, batch: Batch, first: int, dump: bool) -> None:
        assert self._stream is not None
        columns = {name: getattr(batch, name).astype(kind).tobytes() for name, kind in _COLUMNS.items()}
        tokens = batch.tokens[batch.op == STORED].astype("<i4").tobytes()
        entry = {"first": first, "dump": dump, "time": time.time(), **columns, "tokens": tokens, "names": batch.names}
        self._stream.write(self._pack(entry))

    def _write_release(self, release: Release) -> None:
        assert self._stream is not None
        entry = {**release._asdict(), "time": time.time(), "ids": release.tokens.astype("<i4").tobytes()}
        del entry["tokens"]
        self._stream.write(self._pack(entry))
        self.num_requests += 1

    def close(self) -> None:
        """Write the rest and close the file; later calls do nothing. Raises TraceError if it could not be written."""
        self._closing.set()
        self.pump()
        with self._lock:
            stream, self._stream = self._stream, None
            try:
                if stream is not None:
                    stream.close()
            except OSError as error:
                self._failure = self._failure or error
            failure, self._failure = self._failure, None
        if failure is not None:
            raise TraceError(
                f"logging to {self._path} stopped after {self.num_steps} steps: {failure.strerror or failure}: "
                "make room on the disk and record again"
            ) from failure

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def is_log(path: str) -> bool:
    """Whether a file begins as a log does."""
    try:
        with open(path, "rb") as stream:
            return stream.read(len(_HEADS[0])) in _HEADS
    except (OSError, ValueError):
        return False


def read_log(path: str, progress: Callable[[int], None] | None = None) -> Story:
    """The story that a log tells. Keeps it in memory. Raises TraceError for a file that is no log.

    ``progress`` is called with the bytes read so far.
    """
    try:
        with open(path, "rb") as stream:
            entries = _maps(stream)
            header = next(entries, {})
            if header.get(_MAGIC) != VERSION:
                raise TraceError(f"{path} is no operation log of version {VERSION}: give a file of PrefixCache.record")
            try:
                story = Story(int(header["num_pages"]), int(header["page_size"]), bool(header.get("hierarchical")))
                for entry in entries:
                    _add(story, entry)
                    if progress is not None:
                        progress(stream.tell())
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise TraceError(f"{path}: an entry that no log has ({error!r}): the file is damaged") from None
    except OSError as error:
        raise TraceError(f"cannot read {path}: {error.strerror}: check the path") from error
    return story


def _maps(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """The whole maps of a stream; what is cut short at its end is left out."""
    import msgpack

    unpacker = msgpack.Unpacker(stream, max_buffer_size=_MOST_BYTES, strict_map_key=False)
    try:
        for entry in unpacker:
            if not isinstance(entry, dict):
                return
            yield entry
    except (msgpack.UnpackException, ValueError, UnicodeDecodeError):
        return


def _add(story: Story, entry: dict[str, Any]) -> None:
    if "lost" in entry:
        story.lost_releases += int(entry["lost"])
        return
    if "op" not in entry:
        ids = np.frombuffer(entry["ids"], "<i4").astype(np.int32)
        names = ("request", "num_cached", "at")
        numbers = [int(entry[name]) for name in names]
        story.add_release(Release(entry["namespace"], int(entry["num_prompt"]), ids, *numbers), float(entry["time"]))
        return
    columns = {name: np.frombuffer(entry[name], kind) for name, kind in _COLUMNS.items()}
    op = columns["op"].astype(np.int32)
    if any(len(column) != len(op) for column in columns.values()):
        raise InvalidArgument("columns of different lengths")
    tokens = np.zeros((len(op), story.page_size), np.int32)
    tokens[op == STORED] = np.frombuffer(entry["tokens"], "<i4").reshape(-1, story.page_size)
    page, parent, root = (columns[name].astype(np.int32) for name in ("page", "parent", "root"))
    first = int(entry["first"])
    cursor = first if entry["dump"] else first + len(op)
    request, dump = columns["request"].astype(np.int64), bool(entry["dump"])
    batch = Batch(op, page, parent, root, request, tokens, entry["names"], cursor, dump)
    story.add(batch, float(entry["time"]))
