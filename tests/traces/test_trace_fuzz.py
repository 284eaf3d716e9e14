"""Readers meet bytes that no writer wrote: only TraceError comes out, and what they accept is sound."""

import io
import json
import math
import re

import msgpack
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from radixkv import TraceError
from radixkv.traces.curve import capacity_curve
from radixkv.traces.formats import read_trace
from radixkv.traces.formats.json import JsonWriter
from radixkv.traces.formats.msgpack import MsgpackWriter
from radixkv.traces.request import MAX_REQUEST_TOKENS, MAX_TOKEN, MAX_UNIT, Blocks, TraceRequest

KEYS = ["input", "output", "ids", "hash_ids", "unit", "input_length", "output_length", "in", "out", "length", "tail"]
KEYS += ["session", "timestamp", "namespace", "radixkv-trace", "other"]


def written(writer, requests):
    stream = io.BytesIO()
    target = writer(stream)
    for request in requests:
        target.write(request)
    return stream.getvalue()


TOKENS = [TraceRequest([1, 2, 3], [4], session="s", timestamp=1.5, namespace="n"), TraceRequest([1, 2], [2**31 - 1])]
BLOCKS = [TraceRequest(blocks=Blocks(np.array([5, 6], dtype=np.int32), 4, 10, tail=9)) for _ in range(2)]
MOONCAKE = (
    b'{"timestamp": 27482, "input_length": 6755, "output_length": 500, "hash_ids": [46, 47, 48, 2305843009213693951]}\n'
)
SEEDS = [written(writer, requests) for writer in (JsonWriter, MsgpackWriter) for requests in (TOKENS, BLOCKS)]
SEEDS += [MOONCAKE.replace(b"6755", b"2000") * 2, b""]

# Splinters that mean something to a parser: numbers, types, nesting, text that is none, other files.
SPLINTERS = [
    b"0",
    b"-1",
    b"1e999",
    b"1.5",
    b"NaN",
    b"null",
    b"true",
    b'""',
    b"[]",
    b"{}",
    b"[[",
    b'{"a":' * 50,
    b"9" * 400,
]
SPLINTERS += [
    b"9" * 5000,
    b"4294967296",
    b"16777217",
    b'"\\ud800"',
    b"\xed\xa0\x80",
    b"\xff",
    b"\0",
    b"\r\n",
    b"\r",
    b"\n",
]
SPLINTERS += [b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"PK", b"#", b",", b":", b"'", b"\\", b" " * 20]
SPLINTERS += [
    b"\xc0",
    b"\xc1",
    b"\xc2",
    b"\x90",
    b"\x80",
    b"\x91" * 2000,
    b"\x81\xa1a" * 2000,
    b"\xcb\x7f\xf8" + bytes(6),
]
SPLINTERS += [
    b"\xcf" + b"\xff" * 8,
    b"\xd3\x80" + bytes(7),
    b"\xdd\x7f\xff\xff\xff",
    b"\xdf\x7f\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
]
SPLINTERS += [
    b"\xdb\xff\xff\xff\xff",
    b"\xd4\x01\0",
    b"\xd6\xff\0\0\0\0",
    b"\xc7\x03\xff\0\0\0",
    b"\xa1\xff",
    b"\x01",
    b"\xce\x01\0\0\x01",
]
SPLINTERS += [json.dumps(key).encode() for key in KEYS] + [msgpack.packb(key) for key in KEYS]


@st.composite
def damaged(draw):
    """A trace with splinters in place of some of its words, pieces gone and pieces twice."""
    content = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(1, 4))):
        words = [word.span() for word in re.finditer(rb"[0-9.]+|\"[a-z_]*\"|.", content, re.DOTALL)] or [(0, 0)]
        first, last = draw(st.sampled_from(words))
        first, last = draw(st.sampled_from([(first, last), (first, first), (first, last + 8)]))
        piece = draw(st.one_of(st.sampled_from(SPLINTERS), st.just(content[first:last] * 2), st.binary(max_size=8)))
        content = content[:first] + piece + content[last:]
    return content if draw(st.booleans()) else content[: draw(st.integers(0, len(content)))]


# Values that once were accepted, or came out as another error.
NASTY = [math.nan, math.inf, 10**400, 2**62, 2**31, 2**24 + 1, -1, True, None, 1.0, "7", "\ud800", [1, True], [[1]], []]
scalars = st.one_of(st.none(), st.booleans(), st.integers(-2, 10), st.integers(), st.floats(), st.text(max_size=3))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=2), inner, max_size=2)),
    max_leaves=6,
)
tokens = st.lists(st.integers(0, 5), max_size=4)
binary = st.one_of(st.binary(max_size=16), tokens.map(lambda ids: np.array(ids, dtype="<i4").tobytes()))
packable = st.one_of(binary, st.integers(-2, 10), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=3))
packable_nasty = [value for value in NASTY if value not in (10**400, "\ud800")]

JSON_OBJECTS = [
    {"input": [1, 2], "output": [3], "timestamp": 1, "session": "s", "namespace": "n"},
    {"ids": [1, 2], "unit": 4, "input_length": 9, "output_length": 2, "timestamp": 1.5, "session": 7},
    {"ids": [1, 2, 3], "unit": 1, "input_length": 2, "output_length": 1},
    {"ids": [1], "unit": 2**30, "input_length": 2**30},
    {"hash_ids": [1, 2**40], "input_length": 600, "output_length": 7, "timestamp": 27482},
]
MAPS = [
    {"in": bytes(8), "out": bytes(4), "session": "s", "timestamp": 0.5, "namespace": "n"},
    {"ids": bytes(4), "unit": 2**62, "length": 2**62, "tail": 3},
    {"ids": bytes(8), "unit": 4, "length": 9, "tail": 3, "session": "s", "timestamp": 0.5, "namespace": "n"},
]


@st.composite
def altered(draw, originals, values):
    """A request, or several of one form, in which some fields have other values, or are gone, or came in."""
    original, requests = draw(st.sampled_from(originals)), []
    for _ in range(draw(st.integers(1, 3))):
        keys = st.sampled_from([*original] * 3 + KEYS)
        fields = original | draw(st.dictionaries(keys, values, max_size=2))
        for key in draw(st.lists(keys, max_size=1)):
            fields.pop(key, None)
        requests.append(fields)
    return requests


def accepted(content, block_size=512):
    """The requests before the place where the trace is refused, if it is."""
    requests = []
    try:
        for request in read_trace(io.BytesIO(content), block_size):
            requests.append(request)
    except TraceError as error:
        message = str(error)
        assert 20 < len(message) < 400
        assert "\n" not in message
        assert " ()" not in message, "a reason that is none"
        assert "sys." not in message, "a remedy for programmers of Python"
    return requests


def check(requests):
    """What was accepted is within the limits, can be used, and survives both formats."""
    for request in requests:
        assert request.num_in >= 1
        assert request.num_in + request.num_out <= MAX_REQUEST_TOKENS
        tokens = request.tokens_in
        assert len(tokens) == request.num_in
        assert tokens.dtype == np.int32
        assert 0 <= tokens.min() <= tokens.max() <= MAX_TOKEN
        assert request.blocks is None or 1 <= request.blocks.unit <= MAX_UNIT
    for writer in (JsonWriter, MsgpackWriter) if requests else ():
        back = list(read_trace(io.BytesIO(written(writer, requests))))
        assert [(r.num_in, r.session, r.timestamp, r.namespace) for r in back] == [
            (r.num_in, r.session, r.timestamp, r.namespace) for r in requests
        ]
    assert capacity_curve(requests, 3).requests == len(requests)


fuzz = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])


@fuzz
@given(damaged())
def test_damaged_traces_are_refused_by_a_trace_error(content):
    check(accepted(content))


@fuzz
@given(altered(JSON_OBJECTS, st.one_of(values, tokens, st.sampled_from(NASTY))), st.sampled_from([1, 300, 512]))
def test_json_objects_of_any_shape_are_read_or_refused(lines, block_size):
    check(accepted("".join(json.dumps(line) + "\n" for line in lines).encode(), block_size))


@fuzz
@given(altered(MAPS, st.one_of(packable, st.sampled_from(packable_nasty))))
def test_msgpack_maps_of_any_shape_are_read_or_refused(records):
    header = written(MsgpackWriter, [])
    check(accepted(header + b"".join(msgpack.packb(record) for record in records)))


@fuzz
@given(st.binary(max_size=40), st.sampled_from([b"", b"{", b"\n", written(MsgpackWriter, [])]))
def test_any_bytes_are_refused_by_a_trace_error(content, head):
    check(accepted(head + content))
