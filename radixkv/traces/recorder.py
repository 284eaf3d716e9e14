"""Recorder: write the requests that a live cache serves to a trace file, to replay them at other sizes later."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from radixkv.errors import InvalidArgument, TraceError
from radixkv.traces.trace import Request
from radixkv.traces.trace_msgpack import MsgpackWriter

if TYPE_CHECKING:
    from radixkv.cache import Lease, PrefixCache

__all__ = ["Recorder"]


class Recorder:
    """Appends every lease that a cache releases to a msgpack trace: its prompt, its output, its namespace and the time.

        with Recorder("requests.trace").attach(cache):
            serve()

    An ``on_release`` that was set before is still called, first. Recording never disturbs serving: when a request
    cannot be written (a full disk, more tokens than a trace takes), recording stops, and ``close`` raises what
    happened. One recorder serves one cache and any number of threads. The file is replaced if it exists. Raises
    TraceError if it cannot be made.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._cache: PrefixCache | None = None
        self._previous: Callable[[Lease], object] | None = None
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
        if self._cache is not None or self._stream is None:
            raise InvalidArgument("this recorder is attached or closed already: make one for each cache")
        self._cache = cache
        self._previous = cache.on_release
        self._hook = self._on_release  # one object, so that close can tell whether it is still the cache's hook
        cache.on_release = self._hook
        return self

    def close(self) -> None:
        """Stop recording and close the file; later calls do nothing. Raises TraceError if some requests were lost."""
        if self._cache is not None and self._cache.on_release is self._hook:
            self._cache.on_release = self._previous
        self._cache = None
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

    def _on_release(self, lease: Lease) -> None:
        if self._previous is not None:
            self._previous(lease)
        tokens, num_prompt = lease.tokens, lease.num_prompt
        request = Request(tokens[:num_prompt], tokens[num_prompt:], timestamp=time.time(), namespace=lease.namespace)
        with self._lock:
            if self._stream is None or self._failure is not None:
                return
            try:
                self._writer.write(request)
                self.num_requests += 1
            except (OSError, InvalidArgument) as error:
                self._failure = error
