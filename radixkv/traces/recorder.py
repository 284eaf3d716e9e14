"""Recorder: write the requests that a live cache serves to a trace file, to replay them at other sizes later."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from radixkv.errors import InvalidArgument, TraceError
from radixkv.traces.formats.msgpack import MsgpackWriter
from radixkv.traces.request import TraceRequest

if TYPE_CHECKING:
    from radixkv.cache import PrefixCache
    from radixkv.journal import Journal, Release

__all__ = ["Recorder"]

_PERIOD = 0.005  # seconds between two looks at the journal


class Recorder:
    """Appends every lease that ends to a msgpack trace: its prompt, its output, its namespace and the time.

        with Recorder("requests.trace").attach(cache):
            serve()

    It reads the cache's journal in a thread of its own, every few milliseconds, which is how exact the times are.
    Recording never disturbs serving: when a request cannot be written (a full disk, more tokens than a trace takes, or
    more requests at once than the journal holds), recording stops, and ``close`` raises what happened. Any number of
    recorders may follow a cache. The file is replaced if it exists. Raises TraceError if it cannot be made.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._journal: Journal | None = None
        self._cursor = 0
        self._closing = threading.Event()
        self._failure: OSError | InvalidArgument | None = None
        self.num_requests = 0
        """Requests written so far."""
        try:
            self._stream: BinaryIO | None = open(path, "wb")  # noqa: SIM115 (closed by close)
            self._writer = MsgpackWriter(self._stream)
        except OSError as error:
            raise TraceError(f"cannot write {path}: {error.strerror}: check the folder and its permissions") from error

    def attach(self, cache: PrefixCache) -> Recorder:
        """Record what ``cache`` releases from now on. Returns itself, for ``with``."""
        if self._journal is not None or self._stream is None:
            raise InvalidArgument("this recorder is attached or closed already: make one for each cache")
        self._journal = cache.journal()
        self._cursor = self._journal.releases_end
        self._thread = threading.Thread(target=self._follow, name="radixkv recorder", daemon=True)
        self._thread.start()
        return self

    def _follow(self) -> None:
        while not self._closing.wait(_PERIOD):
            self.pump()

    def pump(self) -> None:
        """Write down what was released until now. The recorder's thread does so all the time."""
        with self._lock:
            while self._journal is not None and self._stream is not None and self._failure is None:
                releases, self._cursor, lost = self._journal.releases(self._cursor)
                if lost:
                    self._failure = InvalidArgument(f"{lost} requests ended faster than they could be written")
                elif not releases:
                    return
                else:
                    self._write(releases)

    def _write(self, releases: list[Release]) -> None:
        for release in releases:
            prompt, output = release.tokens[: release.num_prompt], release.tokens[release.num_prompt :]
            try:
                self._writer.write(TraceRequest(prompt, output, timestamp=time.time(), namespace=release.namespace))
            except (OSError, InvalidArgument) as error:
                self._failure = error
                return
            self.num_requests += 1

    def close(self) -> None:
        """Stop recording and close the file; later calls do nothing. Raises TraceError if some requests were lost."""
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
            why, remedy = str(failure), "what came before it is recorded"
            if isinstance(failure, OSError):
                why, remedy = failure.strerror or why, "make room on the disk and record again"
            raise TraceError(
                f"recording to {self._path} stopped after {self.num_requests} requests: {why}: {remedy}"
            ) from failure

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
