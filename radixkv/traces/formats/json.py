"""Requests from JSON lines: Mooncake's format, block ids with a unit, or plain token lists. Writes the last form."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

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

__all__ = ["JsonWriter", "read_json"]

# Block ids become tokens. Small ids stay what they are, larger ones (64-bit hashes) are numbered in order of
# appearance, and the input behind the last id gets a value per request: three ranges of int32 that cannot meet.
_LARGE_ID = 2**30
_FIRST_TAIL = 3 * 2**29


class JsonWriter:
    """Writes requests as JSON lines: ``input`` and ``output`` token lists, session, timestamp, namespace."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, request: TraceRequest) -> None:
        """Append one request. A request given as blocks is written as ``ids`` with ``unit``.

        Raises InvalidArgument for a request beyond the limits of a trace.
        """
        check_writable(request)
        line: dict[str, Any] = {"timestamp": request.timestamp, "session": request.session}
        if request.namespace:
            line["namespace"] = request.namespace
        if request.blocks is not None:
            blocks = request.blocks
            line |= {"unit": blocks.unit, "input_length": blocks.length, "ids": blocks.ids.tolist()}
        else:
            line |= {"input": request.tokens_in.tolist(), "output": request.tokens_out.tolist()}
        self._stream.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")


def read_json(lines: Iterable[bytes], name: str, block_size: int) -> Iterator[TraceRequest]:
    """Yield a request for each line. Raises TraceError with the line number for a line that is not a request."""
    reader = _Reader(block_size)
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        try:
            request = reader.request(line)
        except InvalidArgument as error:
            raise TraceError(f"{name}, line {number}: {error}") from None
        yield request


class _Reader:
    """Turns lines into requests and holds what must agree between them."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._form: str | None = None
        self._large_ids: dict[int, int] = {}
        self._num_tails = 0

    def request(self, line: bytes) -> TraceRequest:
        """The request of one line."""
        fields = _parsed(line)
        if not isinstance(fields, dict):
            raise InvalidArgument("not a JSON object: a trace has one object a line")
        if "hash_ids" in fields:
            self._same_form("hash_ids")
            return self._mooncake(fields)
        if "ids" in fields:
            return self._units(fields)
        if "input" in fields:
            self._same_form("input/output")
            tokens_in, tokens_out = _tokens(fields, "input", at_least=1), _tokens(fields, "output")
            check_length(len(tokens_in) + len(tokens_out))
            return TraceRequest(tokens_in, tokens_out, **labels(fields, seconds=1.0))
        found = ", ".join(map(shown, list(fields)[:6])) or "nothing"
        raise InvalidArgument(f"needs hash_ids, ids or input, has {found}: is this a trace of requests?")

    def _mooncake(self, fields: dict[str, Any]) -> TraceRequest:
        length = whole(fields, "input_length", 1, MAX_REQUEST_TOKENS)
        ids = self._block_ids(fields, "hash_ids")
        unit = self._block_size
        if len(ids) != -(-length // unit):
            raise InvalidArgument(
                f"{len(ids)} hash_ids do not cover input_length {length} at {unit} tokens an id "
                f"({-(-length // unit)} needed): give the trace's block size (--block-size)"
            )
        return TraceRequest(blocks=Blocks(ids, unit, length), **labels(fields, seconds=1e-3))

    def _units(self, fields: dict[str, Any]) -> TraceRequest:
        unit = whole(fields, "unit", 1, MAX_UNIT) if "unit" in fields else 1
        self._same_form(f"ids of unit {unit}")
        length = whole(fields, "input_length", 1, MAX_REQUEST_TOKENS)
        if unit == 1:
            return self._input_then_output(fields, length)
        ids = self._block_ids(fields, "ids")
        if len(ids) not in (length // unit, -(-length // unit)):
            raise InvalidArgument(
                f"{len(ids)} ids do not fit input_length {length} at unit {unit}: "
                f"give one id for each full block ({length // unit})"
            )
        tail = _FIRST_TAIL + self._num_tails % (MAX_TOKEN - _FIRST_TAIL)
        self._num_tails += 1
        return TraceRequest(blocks=Blocks(ids, unit, length, tail), **labels(fields, seconds=1.0))

    @staticmethod
    def _input_then_output(fields: dict[str, Any], length: int) -> TraceRequest:
        ids = _tokens(fields, "ids", at_least=1)
        rest = max(0, len(ids) - length)
        num_out = whole(fields, "output_length", 0, MAX_REQUEST_TOKENS) if "output_length" in fields else rest
        if len(ids) not in (length, length + num_out):
            raise InvalidArgument(
                f"{len(ids)} ids for input_length {length} and output_length {num_out}: "
                "ids of unit 1 cover the input, or the input and then the output"
            )
        check_length(len(ids))
        return TraceRequest(ids[:length], ids[length:], **labels(fields, seconds=1.0))

    def _block_ids(self, fields: dict[str, Any], key: str) -> Tokens:
        ids = _integers(fields, key)
        if len(ids) and int(ids.min()) < 0:
            raise InvalidArgument(f"{key} holds {shown(int(ids.min()))}: an id is not negative")
        if len(ids) and int(ids.max()) >= _LARGE_ID:
            number = self._large_ids
            dense = [i if i < _LARGE_ID else number.setdefault(i, _LARGE_ID + len(number)) for i in ids.tolist()]
            return np.array(dense, dtype=np.int32)
        return ids.astype(np.int32)

    def _same_form(self, form: str) -> None:
        if self._form is None:
            self._form = form
        elif self._form != form:
            raise InvalidArgument(
                f"{form} after lines with {self._form}: a trace has one form; split it into two files"
            )


def _parsed(line: bytes) -> Any:
    if len(line) > MAX_REQUEST_BYTES:
        raise InvalidArgument(f"longer than {MAX_REQUEST_BYTES} bytes: is this a trace of one request a line?")
    try:
        return json.loads(line.removeprefix(b"\xef\xbb\xbf").decode())
    except RecursionError:
        raise InvalidArgument("nested too deeply: a request is one flat object; remove the line") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        hint = "the line is cut short; " if not line.endswith(b"\n") else ""
        raise InvalidArgument(f"not JSON ({error}): {hint}remove the line or write the trace again") from None
    except ValueError:  # of int(), whose work grows with the square of the digits
        raise InvalidArgument("a number has thousands of digits: remove the line or write the trace again") from None


def _integers(fields: dict[str, Any], key: str) -> npt.NDArray[Any]:
    """A list of whole numbers as a 1-D array; Python integers where some are beyond int64."""
    value = fields.get(key)
    if not isinstance(value, list):
        raise InvalidArgument(f"{key} must be a list of whole numbers, not {shown(value)}")
    if not value:
        return np.empty(0, dtype=np.int64)
    wrong = set(map(type, value)) - {int}
    if wrong:
        names = ", ".join(sorted(kind.__name__ for kind in wrong))
        raise InvalidArgument(f"{key} must be a flat list of whole numbers only, but holds {names}")
    try:
        return np.array(value, dtype=np.int64)
    except OverflowError:
        return np.array(value, dtype=object)


def _tokens(fields: dict[str, Any], key: str, at_least: int = 0) -> Tokens:
    tokens = _integers(fields, key) if key in fields else np.empty(0, dtype=np.int64)
    if len(tokens) < at_least:
        raise InvalidArgument(f"{key} is empty: a request has at least 1 token")
    if len(tokens) and not (int(tokens.min()) >= 0 and int(tokens.max()) <= MAX_TOKEN):
        bad = next(int(t) for t in tokens.tolist() if not 0 <= t <= MAX_TOKEN)
        raise InvalidArgument(f"{key} holds {shown(bad)}: a token is from 0 to {MAX_TOKEN}")
    return tokens.astype(np.int32)
