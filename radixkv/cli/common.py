"""What the commands share: outputs that are whole or absent, streams that may be closed, and a line of progress."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, TextIO, cast

__all__ = ["ProgressLine", "binary_output", "flush_output", "printable", "say", "text_output"]


@contextmanager
def binary_output(path: str) -> Iterator[BinaryIO]:
    """Open a file to write; it appears under its name when it is whole, and not at all after an error.

    ``-`` is standard output. A name that is no regular file (a device, a pipe) is written directly. Raises OSError,
    whose message names ``path``.
    """
    if path == "-":
        with _standard_output() as stream:
            yield stream
        return
    with _named(path, ": check the folder, its permissions and the room on the disk"):
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb") as stream:
                yield stream
        else:
            with _whole_or_absent(os.path.realpath(path) if os.path.islink(path) else path) as stream:
                yield stream


@contextmanager
def text_output(path: str) -> Iterator[TextIO]:
    """As ``binary_output``, for UTF-8 text."""
    with binary_output(path) as stream:
        if path == "-":
            yield sys.stdout
            return
        text = io.TextIOWrapper(cast(io.BufferedWriter, stream), encoding="utf-8", newline="\n")
        yield text
        text.detach()  # which flushes


@contextmanager
def _standard_output() -> Iterator[BinaryIO]:
    with _named("standard output"):
        if sys.stdout is None:
            raise OSError("it is closed")
        sys.stdout.flush()
        yield sys.stdout.buffer
        sys.stdout.flush()


@contextmanager
def _whole_or_absent(path: str) -> Iterator[BinaryIO]:
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "wb") as stream:
            yield stream
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise


@contextmanager
def _named(what: str, remedy: str = "") -> Iterator[None]:
    """Makes an OSError name what could not be written, not a temporary file. A closed pipe is none of its business."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"cannot write {what}: {error.strerror or error}{remedy}") from error


def flush_output() -> None:
    """Write out what standard output holds back. Raises OSError."""
    if sys.stdout is not None:
        with _named("standard output"):
            _flush(sys.stdout)


def say(message: str) -> None:
    """Print a line on standard error, if anyone listens."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(message, file=sys.stderr)
        with suppress(OSError):
            _flush(sys.stderr)


def _flush(stream: TextIO) -> None:
    """Flush a standard stream; what it cannot get rid of is dropped, or Python would try again at its exit."""
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
        raise


def printable(name: str) -> str:
    """A file name as standard output can print it."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return name.encode(encoding, "backslashreplace").decode(encoding)


class ProgressLine:
    """Counts requests on standard error while it is a terminal, a few times a second, and wipes the line at the end."""

    def __init__(self) -> None:
        self._shown = sys.stderr is not None and sys.stderr.isatty()
        self._started = self._last = time.monotonic()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *error: object) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def __call__(self, done: int) -> None:
        """Show that ``done`` requests are done."""
        if not self._shown:
            return
        now = time.monotonic()
        if now - self._last >= 0.2:
            self._last = now
            rate = done / (now - self._started)
            sys.stderr.write(f"\r\x1b[K{done:,} requests, {rate:,.0f}/s")
            sys.stderr.flush()
