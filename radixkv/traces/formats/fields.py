"""The fields of one request in a trace file, checked alike in every format and for reading and writing.

What is wrong raises InvalidArgument; a reader, which knows the place in the file, makes a TraceError of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from radixkv.errors import InvalidArgument
from radixkv.traces.request import MAX_REQUEST_TOKENS, MAX_UNIT, TraceRequest

__all__ = ["check_length", "check_writable", "labels", "shown", "whole"]

_SHOWN = 60


def shown(value: object) -> str:
    """A value of a file as it stands in a message: on one line, and short however long it is."""
    if isinstance(value, dict | list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of about {round(value.bit_length() * math.log10(2))} digits"
    text = ascii(value[:_SHOWN] if isinstance(value, str | bytes) else value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def whole(fields: Mapping[str, Any], key: str, at_least: int, at_most: int) -> int:
    """The whole number ``fields[key]``; true and false are none."""
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(f"{key} must be a whole number, not {shown(value)}")
    if value < at_least:
        raise InvalidArgument(f"{key} must be at least {at_least}, not {shown(value)}")
    if value > at_most:
        raise InvalidArgument(f"{key} must be at most {at_most}, not {shown(value)}")
    return value


def check_length(num_tokens: int) -> None:
    """Refuse a request of more tokens, input and output together, than a trace may ask a program to handle."""
    if num_tokens > MAX_REQUEST_TOKENS:
        raise InvalidArgument(f"{num_tokens} tokens of input and output: a request has at most {MAX_REQUEST_TOKENS}")


def check_writable(request: TraceRequest) -> None:
    """Refuse a request that no reader would take back."""
    if request.num_in == 0:
        raise InvalidArgument("a request without input: a trace holds requests of at least 1 token")
    if request.blocks is not None and request.blocks.unit > MAX_UNIT:
        raise InvalidArgument(f"ids of unit {request.blocks.unit}: an id stands for at most {MAX_UNIT} tokens")
    check_length(request.num_in + request.num_out)


def labels(fields: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Session, time and namespace of a request; the file counts time in units of ``seconds``."""
    timestamp = fields.get("timestamp", 0)
    if isinstance(timestamp, bool) or not isinstance(timestamp, int | float):
        raise InvalidArgument(f"timestamp must be a number, not {shown(timestamp)}")
    try:
        timestamp = float(timestamp) * seconds
    except OverflowError:
        timestamp = math.inf  # which TraceRequest refuses, as it refuses what a name cannot be
    return {"session": _name(fields, "session"), "timestamp": timestamp, "namespace": _name(fields, "namespace")}


def _name(fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InvalidArgument(f"{key} must be a name or a whole number, not {shown(value)}")
    return str(value)
