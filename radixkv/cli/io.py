"""What the commands share: files that are whole or absent, and a line of progress."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, TextIO, cast

__all__ = ["ProgressLine", "binary_output", "text_output"]


@contextmanager
def binary_output(path: str) -> Iterator[BinaryIO]:
    """Open a file to write; it appears under its name when it is whole, and not at all after an error.

    ``-`` is standard output. A name that is no regular file (a device, a pipe) is written directly. Raises OSError.
    """
    if path == "-":
        sys.stdout.flush()
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "wb") as stream:
            yield stream
        return
    part = path + ".part"
    try:
        with open(part, "wb") as stream:
            yield stream
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise


@contextmanager
def text_output(path: str) -> Iterator[TextIO]:
    """As ``binary_output``, for UTF-8 text."""
    if path == "-":
        yield sys.stdout
        return
    with binary_output(path) as stream:
        text = io.TextIOWrapper(cast(io.BufferedWriter, stream), encoding="utf-8", newline="\n")
        yield text
        text.flush()
        text.detach()


class ProgressLine:
    """Counts requests on standard error while it is a terminal, a few times a second, and wipes the line at the end."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
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
