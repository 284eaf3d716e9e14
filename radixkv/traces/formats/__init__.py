"""Traces: the requests an inference service saw, one after the other.

Three file formats are read, told apart by their content (never by their name):

* **Mooncake JSON lines**: ``timestamp`` (ms), ``input_length``, ``output_length`` and ``hash_ids``, one id for each
  block of the input (512 tokens unless ``block_size`` says otherwise; the last block may be partly filled).
* **JSON lines**: ``ids`` with ``unit`` tokens per id and ``input_length``, or the lists ``input`` and ``output``.
* **radixkv msgpack** (see :mod:`radixkv.traces.formats.msgpack`): what :class:`radixkv.traces.Recorder` writes.

An id of more than one token stands for the whole prefix up to its block: equal ids mean equal prefixes. Such a block
expands to ``unit`` equal tokens, the id itself, so two blocks with different ids differ from their first token on and
no match inside a block is invented. What a trace gives only as a length is not made up: input behind the last id
becomes tokens that no other request has (they can never hit), and an output without ids is not inserted.

Limits, so that no small file costs gigabytes (what breaks one is a TraceError that names both):

* a request has at most 16,777,216 tokens, input and output together (``MAX_REQUEST_TOKENS``);
* an id stands for at most 4,096 of them (``MAX_UNIT``), so each byte of a file for 2,048 at most;
* a request takes up at most 134,217,728 bytes, as a line or as a msgpack object (``MAX_REQUEST_BYTES``).

A ``timestamp`` is a finite number; ``session`` and ``namespace`` are text or whole numbers, and null is no name.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from radixkv.errors import InvalidArgument, TraceError
from radixkv.traces.formats.json import read_json
from radixkv.traces.formats.msgpack import is_msgpack, read_msgpack
from radixkv.traces.request import MAX_REQUEST_BYTES, MAX_UNIT, MOONCAKE_BLOCK, TraceRequest

__all__ = ["open_trace", "read_trace"]

_HEAD_BYTES = 16


@contextmanager
def open_trace(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a trace for reading; ``-`` is standard input. Raises TraceError where the file cannot be read."""
    if path == "-":
        if sys.stdin is None:
            raise TraceError("cannot read standard input: it is closed: name a file")
        yield sys.stdin.buffer
        return
    try:
        stream = open(path, "rb")  # noqa: SIM115 (the with below closes it)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise TraceError(f"cannot read {path}: {why}: check the path (- reads standard input)") from error
    with stream:
        yield stream


def read_trace(source: str | os.PathLike[str] | BinaryIO, block_size: int = MOONCAKE_BLOCK) -> Iterator[TraceRequest]:
    """Read a trace lazily, one request at a time, in file order.

    ``source`` is a path, ``-`` for standard input, or a binary stream, which is left open. ``block_size`` is the number
    of tokens per hash id of a Mooncake trace. Raises TraceError, with the line or byte number and a remedy, for a file
    that is empty, foreign, truncated, inconsistent or beyond a limit; the requests before that place have been yielded
    by then.
    """
    if not 1 <= block_size <= MAX_UNIT:
        raise InvalidArgument(f"a block has from 1 to {MAX_UNIT} tokens, not {block_size}")
    if isinstance(source, str | os.PathLike):
        return _read_path(source, block_size)
    return _read_stream(source, "the trace", block_size)


def _read_path(path: str | os.PathLike[str], block_size: int) -> Iterator[TraceRequest]:
    with open_trace(path) as stream:
        name = "standard input" if path == "-" else str(path)
        try:
            yield from _read_stream(stream, name, block_size)
        except OSError as error:
            raise TraceError(f"cannot read {name}: {error.strerror or error}: is it a regular file?") from error


def _read_stream(stream: BinaryIO, name: str, block_size: int) -> Iterator[TraceRequest]:
    head = _head(stream)
    if is_msgpack(head):
        requests = read_msgpack(head, stream, name)
    elif head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b""):
        requests = read_json(_lines(head, stream), name, block_size)
    else:
        raise TraceError(f"{name} is not a trace: {_foreign(head)}")
    empty = True
    for request in requests:
        empty = False
        yield request
    if empty:
        raise TraceError(f"{name} holds no request: was it written to the end?")


def _head(stream: BinaryIO) -> bytes:
    """The first bytes of a stream; a pipe may hand them out in pieces."""
    head = b""
    while len(head) < _HEAD_BYTES:
        piece = stream.read(_HEAD_BYTES - len(head))
        if not isinstance(piece, bytes):
            raise InvalidArgument(f"the trace reads as {type(piece).__name__}, not bytes: open it in binary mode")
        if not piece:
            break
        head += piece
    return head


def _lines(head: bytes, stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a stream whose first bytes have been read already; of an endless line, no more than is refused."""
    yield from io.BytesIO(head + stream.readline(MAX_REQUEST_BYTES))
    while line := stream.readline(MAX_REQUEST_BYTES + 1):
        yield line


def _foreign(head: bytes) -> str:
    """What the first bytes of a file say it is instead, and what to do about it."""
    if head.startswith(b"PK"):
        return "this is a zip or .npz archive; convert it to JSON lines first"
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")):
        return "this is a compressed file; decompress it and pipe it in, as in `gunzip -c FILE | radixkv replay - ...`"
    if head.startswith(b"["):
        return "this is one JSON array; write one JSON object a line, as `jq -c .[] FILE` does"
    return f"it starts with {head[:8]!r}; expected JSON lines or a radixkv msgpack trace"
