"""The trace format of radixkv: a stream of msgpack objects, appended to while a service runs.

    header    {"radixkv-trace": 1}                                     the name is the magic, the value the version
    request   {"in": bin, "out": bin, ...}                             tokens, little-endian int32
              {"ids": bin, "unit": int, "length": int, "tail": int, ...}  or an input given by block ids
              ... "session": str, "timestamp": float (s), "namespace": str

One map a request and nothing refers to an earlier one, so a file that was cut short is whole up to its last whole
request, and two files join by dropping the second header. Unknown keys of a request are ignored. A map has at most 64
keys, and no value is an array or a map: what a reader ignores must not cost it more than what it reads. The limits of
:mod:`radixkv.traces.formats` apply.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import msgpack
import numpy as np

from radixkv.errors import InvalidArgument, TraceError
from radixkv.traces.formats.fields import check_length, check_writable, labels, shown, whole
from radixkv.traces.request import (
    MAX_REQUEST_BYTES,
    MAX_REQUEST_TOKENS,
    MAX_TOKEN,
    MAX_UNIT,
    Blocks,
    Tokens,
    TraceRequest,
)

__all__ = ["MsgpackWriter", "is_msgpack", "read_msgpack"]

VERSION = 1
_MAGIC = "radixkv-trace"
_INT32 = np.dtype("<i4")
_CHUNK = 1 << 20
_MAX_KEYS = 64


class MsgpackWriter:
    """Writes requests to a binary stream, which the caller opens, flushes and closes. The header is written at once."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._packer = msgpack.Packer(use_bin_type=True)
        stream.write(self._packer.pack({_MAGIC: VERSION}))

    def write(self, request: TraceRequest) -> None:
        """Append one request. O(its tokens or ids); one write call, so a crash cuts at most the last request.

        Raises InvalidArgument for a request beyond the limits of a trace.
        """
        check_writable(request)
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


def read_msgpack(head: bytes, stream: BinaryIO, name: str) -> Iterator[TraceRequest]:
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
        except InvalidArgument as error:
            raise TraceError(f"{name}, byte {start}: not a request ({error}): {_damaged(start)}") from None
        new_kind = "tokens" if request.blocks is None else f"ids of unit {request.blocks.unit}"
        if kind and new_kind != kind:
            raise TraceError(f"{name}, byte {start}: {new_kind} after {kind}: a trace has one form; split the file")
        kind = new_kind
        yield request


def _objects(head: bytes, stream: BinaryIO, name: str) -> Iterator[tuple[int, Any]]:
    """Each object of the stream with the byte it starts at."""
    unpacker = msgpack.Unpacker(
        raw=False,
        max_array_len=0,
        max_map_len=_MAX_KEYS,
        object_hook=_flat,
        max_buffer_size=MAX_REQUEST_BYTES + _CHUNK,
    )
    unpacker.feed(head)
    num_bytes, start = len(head), 0
    while True:
        try:
            for value in unpacker:
                yield start, value
                start = unpacker.tell()
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise TraceError(f"{name}, byte {start}: {_reason(error)}: {_damaged(start)}") from None
        if num_bytes - start > MAX_REQUEST_BYTES:
            raise TraceError(
                f"{name}, byte {start}: more than {MAX_REQUEST_BYTES} bytes, the most of a request: {_damaged(start)}"
            )
        chunk = stream.read(_CHUNK)
        if not chunk:
            break
        unpacker.feed(chunk)
        num_bytes += len(chunk)
    if start != num_bytes:
        raise TraceError(
            f"{name}, byte {start}: the file ends here, in the middle of "
            f"{'a request' if start else 'its header'} ({num_bytes - start} bytes of it are there): {_damaged(start)}"
        )


def _flat(record: dict[Any, Any]) -> dict[Any, Any]:
    """A map as it is, if no value is a map."""
    if any(isinstance(value, dict) for value in record.values()):
        raise InvalidArgument("a map in a map")
    return record


def _reason(error: Exception) -> str:
    """What the unpacker refused, in words: some of its errors have none."""
    if isinstance(error, msgpack.exceptions.StackError):
        return "not a request (nested too deeply)"
    if isinstance(error, msgpack.exceptions.FormatError):
        return "not msgpack (a byte that the format does not use)"
    return f"not a request ({error})"


def _damaged(start: int) -> str:
    if start == 0:
        return "the file is damaged; record it again"
    return f"the file is damaged; `head -c {start}` keeps the whole requests before it"


def _check_header(value: Any, name: str) -> None:
    version = value.get(_MAGIC) if isinstance(value, dict) else None
    if version != VERSION:
        raise TraceError(
            f"{name}: trace format version {shown(version)}, this radixkv reads version {VERSION}: "
            "install the radixkv that wrote it, or record it again"
        )


def _request(record: Any) -> TraceRequest:
    if not isinstance(record, dict):
        raise InvalidArgument(f"a map was expected, not {type(record).__name__}")
    names = labels(record, seconds=1.0)
    if "ids" not in record:
        tokens_in, tokens_out = _unpack(record, "in"), _unpack(record, "out")
        if not len(tokens_in):
            raise InvalidArgument("in is empty")
        check_length(len(tokens_in) + len(tokens_out))
        return TraceRequest(tokens_in, tokens_out, **names)
    ids, tail = _unpack(record, "ids"), whole(record, "tail", 0, MAX_TOKEN)
    unit, length = whole(record, "unit", 1, MAX_UNIT), whole(record, "length", 1, MAX_REQUEST_TOKENS)
    if len(ids) not in (length // unit, -(-length // unit)):
        raise InvalidArgument(f"{len(ids)} ids do not fit length {length} at unit {unit}")
    return TraceRequest(blocks=Blocks(ids, unit, length, tail), **names)


def _pack(tokens: Tokens) -> bytes:
    return tokens.astype(_INT32, copy=False).tobytes()


def _unpack(record: dict[Any, Any], key: str) -> Tokens:
    if key not in record:
        raise InvalidArgument(f"no {key!r}")
    value = record[key]
    if not isinstance(value, bytes) or len(value) % _INT32.itemsize:
        raise InvalidArgument(f"{key} must be a run of 4-byte integers, not {shown(value)}")
    tokens = np.frombuffer(value, dtype=_INT32).astype(np.int32, copy=False)
    if len(tokens) and int(tokens.min()) < 0:
        raise InvalidArgument(f"{key} holds {int(tokens.min())}: a token is not negative")
    return tokens
