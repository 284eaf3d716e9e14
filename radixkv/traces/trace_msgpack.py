"""The trace format of radixkv: a stream of msgpack objects, appended to while a service runs.

    header    {"radixkv-trace": 1}                                     the name is the magic, the value the version
    request   {"in": bin, "out": bin, ...}                             tokens, little-endian int32
              {"ids": bin, "unit": int, "length": int, "tail": int, ...}  or an input given by block ids
              ... "session": str, "timestamp": float (s), "namespace": str

One map a request and nothing refers to an earlier one, so a file that was cut short is whole up to its last whole
request, and two files join by dropping the second header. Unknown keys of a request are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import msgpack
import numpy as np

from radixkv.errors import TraceError
from radixkv.traces.trace import Blocks, Request, Tokens

__all__ = ["MsgpackWriter", "is_msgpack", "read_msgpack"]

VERSION = 1
_MAGIC = "radixkv-trace"
_INT32 = np.dtype("<i4")
_CHUNK = 1 << 20
_MAX_OBJECT = 2**31 - 1


class MsgpackWriter:
    """Writes requests to a binary stream, which the caller opens, flushes and closes. The header is written at once."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._packer = msgpack.Packer(use_bin_type=True)
        stream.write(self._packer.pack({_MAGIC: VERSION}))

    def write(self, request: Request) -> None:
        """Append one request. O(its tokens or ids); one write call, so a crash cuts at most the last request."""
        record: dict[str, Any]
        if request.blocks is not None:
            blocks = request.blocks
            record = {"ids": _pack(blocks.ids), "unit": blocks.unit, "length": blocks.length, "tail": blocks.tail}
        else:
            record = {"in": _pack(request.tokens_in), "out": _pack(request.tokens_out)}
        record |= {"session": request.session, "timestamp": request.timestamp, "namespace": request.namespace}
        self._stream.write(self._packer.pack(record))


def is_msgpack(head: bytes) -> bool:
    """Whether a file that starts with ``head`` (16 bytes or more) is a radixkv msgpack trace of any version."""
    magic = msgpack.packb(_MAGIC)
    return len(head) > len(magic) and head[0] & 0xF0 == 0x80 and head[1 : 1 + len(magic)] == magic


def read_msgpack(head: bytes, stream: BinaryIO, name: str) -> Iterator[Request]:
    """Yield the requests of a stream whose first bytes, ``head``, have been read.

    Raises TraceError with the byte number.
    """
    start, kind = 0, ""
    for start, value in _objects(head, stream, name):
        if start == 0:
            _check_header(value, name)
            continue
        try:
            request = _request(value)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            detail = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise TraceError(
                f"{name}, byte {start}: not a request ({detail}): "
                f"the file is damaged; `head -c {start}` keeps the whole requests before it"
            ) from None
        new_kind = "tokens" if request.blocks is None else f"ids of unit {request.blocks.unit}"
        if kind and new_kind != kind:
            raise TraceError(f"{name}, byte {start}: {new_kind} after {kind}: a trace has one form; split the file")
        kind = new_kind
        yield request


def _objects(head: bytes, stream: BinaryIO, name: str) -> Iterator[tuple[int, Any]]:
    """Each object of the stream with the byte it starts at."""
    unpacker = msgpack.Unpacker(raw=False, max_buffer_size=_MAX_OBJECT)
    unpacker.feed(head)
    num_bytes, start = len(head), 0
    while True:
        try:
            for value in unpacker:
                yield start, value
                start = unpacker.tell()
            chunk = stream.read(_CHUNK)
            if not chunk:
                break
            unpacker.feed(chunk)
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise TraceError(
                f"{name}, byte {start}: not msgpack ({error or type(error).__name__}): "
                f"the file is damaged; `head -c {start}` keeps the whole requests before it"
            ) from None
        num_bytes += len(chunk)
    if start != num_bytes:
        raise TraceError(
            f"{name}, byte {start}: the last request is cut short ({num_bytes - start} bytes of it are there): "
            f"`head -c {start}` keeps the whole requests before it"
        )


def _check_header(value: Any, name: str) -> None:
    version = value.get(_MAGIC) if isinstance(value, dict) else None
    if version != VERSION:
        raise TraceError(
            f"{name}: trace format version {version}, this radixkv reads version {VERSION}: "
            "install the radixkv that wrote it, or record it again"
        )


def _request(record: Any) -> Request:
    if not isinstance(record, dict):
        raise TypeError(f"a map was expected, not {type(record).__name__}")
    labels: dict[str, Any] = {
        "session": str(record.get("session", "")),
        "timestamp": float(record.get("timestamp", 0.0)),
        "namespace": str(record.get("namespace", "")),
    }
    if "ids" not in record:
        tokens = _unpack(record["in"], "in")
        if not len(tokens):
            raise ValueError("in is empty")
        return Request(tokens, _unpack(record["out"], "out"), **labels)
    ids, unit, length, tail = _unpack(record["ids"], "ids"), record["unit"], record["length"], record["tail"]
    if not all(type(number) is int and number >= 1 for number in (unit, length)) or not 0 <= tail < 2**31:
        raise ValueError(f"unit {unit}, length {length}, tail {tail} cannot be")
    if len(ids) not in (length // unit, -(-length // unit)):
        raise ValueError(f"{len(ids)} ids do not fit length {length} at unit {unit}")
    return Request(blocks=Blocks(ids, unit, length, tail), **labels)


def _pack(tokens: Tokens) -> bytes:
    return tokens.astype(_INT32, copy=False).tobytes()


def _unpack(value: Any, key: str) -> Tokens:
    if not isinstance(value, bytes) or len(value) % _INT32.itemsize:
        raise ValueError(f"{key} must be a run of 4-byte integers")
    tokens = np.frombuffer(value, dtype=_INT32).astype(np.int32, copy=False)
    if len(tokens) and int(tokens.min()) < 0:
        raise ValueError(f"{key} holds {int(tokens.min())}: a token is not negative")
    return tokens
