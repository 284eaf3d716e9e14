"""Traces: the requests an inference service saw, one after the other.

Three file formats are read, told apart by their content (never by their name):

* **Mooncake JSON lines**: ``timestamp`` (ms), ``input_length``, ``output_length`` and ``hash_ids``, one id for each
  block of the input (512 tokens unless ``block_size`` says otherwise; the last block may be partly filled).
* **JSON lines**: ``ids`` with ``unit`` tokens per id and ``input_length``, or the lists ``input`` and ``output``.
* **radixkv msgpack** (see :mod:`radixkv.traces.trace_msgpack`): what :class:`radixkv.traces.recorder.Recorder` writes.

An id of more than one token stands for the whole prefix up to its block: equal ids mean equal prefixes. Such a block
expands to ``unit`` equal tokens, the id itself, so two blocks with different ids differ from their first token on and
no match inside a block is invented. What a trace gives only as a length is not made up: input behind the last id
becomes tokens that no other request has (they can never hit), and an output without ids is not inserted.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from radixkv.errors import InvalidArgument, InvalidTokens, TraceError

__all__ = ["Blocks", "Request", "Tokens", "open_trace", "read_trace"]

Tokens: TypeAlias = npt.NDArray[np.int32]

MOONCAKE_BLOCK = 512
"""Tokens per hash id in the published Mooncake traces."""

MAX_TOKEN = 2**31 - 1
"""The largest token id (int32)."""

_NO_TOKENS: Tokens = np.empty(0, dtype=np.int32)
_HEAD_BYTES = 16


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """An input of ``length`` tokens given by prefix-chained block ids instead of tokens.

    ``ids`` [n] int32 covers the first ``n * unit`` tokens (fewer where the last block is partial). Tokens behind them,
    if any, all have the value ``tail``, which no other request uses.
    """

    ids: Tokens
    unit: int
    length: int
    tail: int = MAX_TOKEN

    def tokens(self) -> Tokens:
        """The input as tokens, [length] int32. O(length)."""
        tokens = np.repeat(self.ids, self.unit)[: self.length]
        if len(tokens) < self.length:
            tail = np.full(self.length - len(tokens), self.tail, dtype=np.int32)
            tokens = np.concatenate([tokens, tail])
        return tokens


class Request:
    """One request: its input tokens, the output tokens where the trace has them, and who asked when.

    Give either ``tokens_in`` ([n] int32) or ``blocks``; the tokens of blocks are expanded each time ``tokens_in`` is
    read and not kept. ``timestamp`` is in seconds; ``session`` and ``namespace`` are names, empty where unknown.
    """

    __slots__ = ("_input", "namespace", "session", "timestamp", "tokens_out")

    def __init__(
        self,
        tokens_in: npt.ArrayLike | None = None,
        tokens_out: npt.ArrayLike | None = None,
        *,
        session: str = "",
        timestamp: float = 0.0,
        namespace: str = "",
        blocks: Blocks | None = None,
    ) -> None:
        if tokens_in is not None and blocks is None:
            self._input: Tokens | Blocks = _int32(tokens_in)
        elif blocks is not None and tokens_in is None:
            self._input = blocks
        else:
            raise InvalidArgument("a request has either tokens_in or blocks: give exactly one of them")
        self.tokens_out: Tokens = _NO_TOKENS if tokens_out is None else _int32(tokens_out)
        self.session = session
        self.timestamp = timestamp
        self.namespace = namespace

    @property
    def blocks(self) -> Blocks | None:
        """The input as block ids, or None for a request given as tokens."""
        return self._input if isinstance(self._input, Blocks) else None

    @property
    def tokens_in(self) -> Tokens:
        """The input tokens, [num_in] int32. O(num_in) for a request given as blocks, else O(1)."""
        return self._input.tokens() if isinstance(self._input, Blocks) else self._input

    @property
    def num_in(self) -> int:
        """The number of input tokens, known without expanding blocks."""
        return self._input.length if isinstance(self._input, Blocks) else len(self._input)

    @property
    def num_out(self) -> int:
        """The number of output tokens that the trace has ids for."""
        return len(self.tokens_out)

    def __repr__(self) -> str:
        return f"Request({self.num_in} in, {self.num_out} out, session={self.session!r}, timestamp={self.timestamp})"


def _int32(tokens: npt.ArrayLike) -> Tokens:
    array = np.asarray(tokens)
    if array.dtype == np.int32 and array.ndim == 1:
        return array
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InvalidTokens(f"tokens are a list of whole numbers, not {array.ndim}-D {array.dtype}")
    if array.size and not (array.min() >= 0 and array.max() <= MAX_TOKEN):
        raise InvalidTokens(f"tokens from {array.min()} to {array.max()}: each must be from 0 to {MAX_TOKEN}")
    return array.astype(np.int32)


@contextmanager
def open_trace(path: str) -> Iterator[BinaryIO]:
    """Open a trace for reading; ``-`` is standard input. Raises TraceError where the file cannot be read."""
    if path == "-":
        yield sys.stdin.buffer
        return
    try:
        stream = open(path, "rb")  # noqa: SIM115 (the with below closes it)
    except OSError as error:
        raise TraceError(f"cannot read {path}: {error.strerror}: check the path (- reads standard input)") from error
    with stream:
        yield stream


def read_trace(source: str | BinaryIO, block_size: int = MOONCAKE_BLOCK) -> Iterator[Request]:
    """Read a trace lazily, one request at a time, in file order.

    ``source`` is a path, ``-`` for standard input, or a binary stream, which is left open. ``block_size`` is the number
    of tokens per hash id of a Mooncake trace. Raises TraceError, with the line or byte number and a remedy, for a file
    that is empty, foreign, truncated or inconsistent; the requests before that place have been yielded by then.
    """
    if block_size < 1:
        raise InvalidArgument(f"a block has at least 1 token, not {block_size}")
    if not isinstance(source, str):
        yield from _read_stream(source, "the trace", block_size)
        return
    with open_trace(source) as stream:
        name = "standard input" if source == "-" else source
        try:
            yield from _read_stream(stream, name, block_size)
        except OSError as error:
            raise TraceError(f"cannot read {name}: {error.strerror or error}: is it a regular file?") from error


def _read_stream(stream: BinaryIO, name: str, block_size: int) -> Iterator[Request]:
    from radixkv.traces.trace_json import read_json
    from radixkv.traces.trace_msgpack import is_msgpack, read_msgpack

    head = stream.read(_HEAD_BYTES)
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


def _lines(head: bytes, stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a stream whose first bytes have been read already."""
    yield from io.BytesIO(head + stream.readline())
    yield from stream


def _foreign(head: bytes) -> str:
    """What the first bytes of a file say it is instead, and what to do about it."""
    if head.startswith(b"PK"):
        return "this is a zip or .npz archive; convert it to JSON lines first"
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")):
        return "this is a compressed file; decompress it and pipe it in, as in `gunzip -c FILE | radixkv replay - ...`"
    if head.startswith(b"["):
        return "this is one JSON array; write one JSON object a line, as `jq -c .[] FILE` does"
    return f"it starts with {head[:8]!r}; expected JSON lines or a radixkv msgpack trace"
