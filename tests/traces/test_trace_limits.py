"""What no trace may ask for: a few bytes never cost gigabytes, minutes or a traceback, and the refusal says why."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import msgpack
import numpy as np
import pytest

import radixkv
from radixkv import InvalidArgument, PrefixCache, TraceError
from radixkv.traces.formats import read_trace
from radixkv.traces.formats.json import JsonWriter
from radixkv.traces.formats.msgpack import MsgpackWriter
from radixkv.traces.recorder import Recorder
from radixkv.traces.request import MAX_REQUEST_BYTES, MAX_REQUEST_TOKENS, MAX_UNIT, Blocks, TraceRequest

HEADER = msgpack.packb({"radixkv-trace": 1})


def line(**fields):
    return json.dumps(fields).encode() + b"\n"


def record(**fields):
    return HEADER + msgpack.packb(fields)


def ids_of(count):
    return {"ids": bytes(4 * count), "tail": 0}


def refusal(content, **options):
    with pytest.raises(TraceError) as error:
        list(read_trace(io.BytesIO(content), **options))
    return str(error.value)


LENGTHS = {"one more": MAX_REQUEST_TOKENS + 1, "2**30": 2**30, "2**31": 2**31, "10**18": 10**18, "10**400": 10**400}


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
def test_a_length_beyond_the_limit_is_refused_with_line_and_limit(length):
    words = f"line 1: input_length must be at most {MAX_REQUEST_TOKENS}, not "
    assert words in refusal(line(ids=[1], unit=2, input_length=length))
    assert words in refusal(line(ids=[1], input_length=length))
    assert words in refusal(line(hash_ids=[1], input_length=length))
    if length < 2**63:
        words = f"byte 16: not a request (length must be at most {MAX_REQUEST_TOKENS}, not {length})"
        assert words in refusal(record(**ids_of(1), unit=2, length=length))


def test_a_unit_beyond_the_limit_is_refused_with_line_and_limit():
    words = f"unit must be at most {MAX_UNIT}, not {MAX_UNIT + 1}"
    assert f"line 1: {words}" in refusal(line(ids=[1], unit=MAX_UNIT + 1, input_length=MAX_UNIT + 1))
    assert f"byte 16: not a request ({words})" in refusal(record(**ids_of(1), unit=MAX_UNIT + 1, length=1))
    with pytest.raises(InvalidArgument, match=f"from 1 to {MAX_UNIT} tokens, not {MAX_UNIT + 1}"):
        read_trace(io.BytesIO(b""), block_size=MAX_UNIT + 1)


def test_input_and_output_count_together():
    most = MAX_REQUEST_TOKENS
    words = f"{most + 1} tokens of input and output: a request has at most {most}"
    assert words in refusal(record(**{"in": bytes(4 * most), "out": bytes(4)}))
    (request,) = read_trace(io.BytesIO(record(**{"in": bytes(4 * (most - 1)), "out": bytes(4)})))
    assert request.num_in + request.num_out == most


def test_input_and_output_of_json_lines_count_together(monkeypatch):
    monkeypatch.setattr("radixkv.traces.formats.fields.MAX_REQUEST_TOKENS", 3)
    words = "line 2: 4 tokens of input and output: a request has at most 3"
    assert words in refusal(line(input=[1, 2], output=[3]) + line(input=[1, 2], output=[3, 4]))
    assert words in refusal(line(ids=[1, 2, 3], input_length=2) + line(ids=[1, 2, 3, 4], input_length=2))


def test_the_largest_request_is_read_and_costs_what_its_tokens_cost():
    count = MAX_REQUEST_TOKENS // MAX_UNIT
    (request,) = read_trace(io.BytesIO(line(ids=[*range(count)], unit=MAX_UNIT, input_length=MAX_REQUEST_TOKENS)))
    assert len(request.tokens_in) == request.num_in == MAX_REQUEST_TOKENS


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
def test_a_time_that_is_not_finite_is_refused(text):
    bad = b'{"input":[1],"timestamp":' + text.encode() + b"}\n"
    assert "line 2: timestamp must be a finite number of seconds" in refusal(line(input=[1]) + bad)
    if len(text) < 20:
        found = refusal(record(**{"in": bytes(4), "out": b"", "timestamp": float(text)}))
        assert "byte 16: not a request (timestamp must be a finite number of seconds" in found
        with pytest.raises(InvalidArgument, match="finite"):
            TraceRequest([1], timestamp=float(text))


@pytest.mark.parametrize("key", ["session", "namespace"])
def test_a_name_is_text(key):
    assert f"line 1: {key} is no Unicode text: half a surrogate pair at character 1" in refusal(
        b'{"input":[1],"' + key.encode() + b'":"a\\ud800"}\n'
    )
    for bad, words in ([1], "a list of 1"), ({"a": 1}, "a dict of 1"), (True, "True"), (1.5, "1.5"):
        assert f"line 1: {key} must be a name or a whole number, not {words}" in refusal(line(input=[1], **{key: bad}))
    assert f"{key} must be a name or a whole number, not b'x'" in refusal(record(**{"in": bytes(4), key: b"x"}))
    (request,) = read_trace(io.BytesIO(line(input=[1], **{key: None})))
    assert getattr(request, key) == "", "null is no name, as if it were not there"
    with pytest.raises(InvalidArgument, match=key):
        TraceRequest([1], **{key: "\ud800"})


def test_a_number_of_thousands_of_digits_is_refused():
    found = refusal(b'{"input":[1],"timestamp":1' + b"0" * 5000 + b"}\n")
    assert "line 1: a number has thousands of digits" in found


def test_a_value_in_a_message_is_short():
    assert len(refusal(line(input="x" * 10**6))) < 200
    assert len(refusal(line(hash_ids=[1], input_length="\n" * 10**6))) < 200
    assert len(refusal(line(**{"k" * 10**6: 1}))) < 200
    assert len(refusal(line(input=[10**4000]))) < 200
    assert "\n" not in refusal(line(**{"a\nb": 1}))


ARRAY = b"\xdd\x7f\xff\xff\xff"
MAP = b"\xdf\x7f\xff\xff\xff"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"\x81\xa2in" + ARRAY, "2147483647 exceeds max_array_len"),
        (b"\x81\xa1x\x91\xc0", "not a request (1 exceeds max_array_len"),
        (MAP, "2147483647 exceeds max_map_len(64)"),
        (b"\x81\xa1x\x81\xa1y\xc0", "not a request (a map in a map)"),
        (b"\x81\xa1x" * 5000, "not a request (nested too deeply)"),
        (b"\x91" * 5000, "not a request (1 exceeds max_array_len"),
        (b"\xc1", "not msgpack (a byte that the format does not use)"),
        (b"\x81\xa2in\xc6\xff\xff\xff\xff", "the file ends here, in the middle of a request"),
    ],
)
def test_what_a_msgpack_trace_never_holds_is_refused_with_a_reason(body, words):
    found = refusal(HEADER + body)
    assert "byte 16: " in found
    assert words in found
    assert "head -c 16" in found


def test_a_msgpack_trace_cut_in_its_header_holds_nothing_to_keep():
    found = refusal(HEADER[:-1] + b"\xcd\x00")
    assert "in the middle of its header" in found
    assert "head -c" not in found


class Endless(io.RawIOBase):
    """A start and then one byte for ever; counts what was read."""

    def __init__(self, start, filler):
        self._start, self._filler, self.num_read = io.BytesIO(start), filler, 0

    def readable(self):
        return True

    def readinto(self, buffer):
        piece = self._start.read(len(buffer)) or self._filler * len(buffer)
        buffer[: len(piece)] = piece
        self.num_read += len(piece)
        return len(piece)


@pytest.mark.parametrize(
    ("start", "filler", "words"),
    [
        (b'{"input": "', b"x", f"line 1: longer than {MAX_REQUEST_BYTES} bytes"),
        (b'{"input": [1]}\n{', b" ", f"line 2: longer than {MAX_REQUEST_BYTES} bytes"),
        (HEADER + b"\x81\xa1x\xc6\xff\xff\xff\xff", b"\0", f"byte 16: more than {MAX_REQUEST_BYTES} bytes"),
    ],
)
def test_a_request_without_end_is_given_up(start, filler, words):
    stream = Endless(start, filler)
    with pytest.raises(TraceError, match=words):
        list(read_trace(io.BufferedReader(stream)))
    assert stream.num_read < MAX_REQUEST_BYTES + 2**22


SMALL_FILES = {
    "unit": line(ids=[1], unit=2**30, input_length=2**30),
    "length": line(ids=[1], unit=2**31, input_length=2**31),
    "hash": line(hash_ids=[1], input_length=10**18),
    "msgpack": record(**ids_of(1), unit=2**62, length=2**62),
    "array": HEADER + b"\x81\xa2in" + ARRAY,
    "nils": HEADER + b"\x81\xa2in\xdd\x01\xe8\x48\x00" + b"\xc0" * 32_000_000,
    "lists": b'{"input":[' + b"[]," * 3_000_000 + b"1]}\n",
    "largest": line(ids=[*range(4096)], unit=MAX_UNIT, input_length=MAX_REQUEST_TOKENS),
    "largest mooncake": line(hash_ids=[*range(32768)], input_length=MAX_REQUEST_TOKENS),
    "tail": line(ids=[], unit=MAX_UNIT, input_length=MAX_UNIT - 1) * 1000,
}

CURVE = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
from radixkv import TraceError
from radixkv.traces.curve import capacity_curve
from radixkv.traces.formats import read_trace
started = time.process_time()
try:
    capacity_curve(read_trace(sys.argv[1]), int(sys.argv[2]))
except TraceError as error:
    print(error)
assert time.process_time() - started < 10
"""


@pytest.mark.parametrize("page_size", [16, 7])
@pytest.mark.parametrize("name", SMALL_FILES)
def test_a_small_file_fits_into_a_gibibyte(tmp_path, name, page_size):
    path = tmp_path / "trace"
    path.write_bytes(SMALL_FILES[name])
    environment = {**os.environ, "PYTHONPATH": str(Path(radixkv.__file__).parents[1]), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CURVE, str(path), str(page_size)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    if name.startswith(("largest", "tail")):
        assert result.stdout == ""
    else:
        assert "line 1" in result.stdout or "byte 16" in result.stdout


@pytest.mark.parametrize("writer", [JsonWriter, MsgpackWriter])
def test_a_writer_refuses_what_no_reader_takes_back(writer):
    stream = io.BytesIO()
    target = writer(stream)
    before = stream.getvalue()
    for request, words in (
        (TraceRequest([]), "without input"),
        (TraceRequest(np.zeros(MAX_REQUEST_TOKENS, dtype=np.int32), [1]), f"at most {MAX_REQUEST_TOKENS}"),
        (TraceRequest(blocks=Blocks(np.zeros(1, dtype=np.int32), MAX_UNIT + 1, 8)), f"at most {MAX_UNIT} tokens"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            target.write(request)
    assert stream.getvalue() == before


def test_a_recording_ends_at_a_request_that_no_trace_takes_and_serving_goes_on(tmp_path):
    path = tmp_path / "trace"
    with PrefixCache(num_pages=2**15, page_size=1024) as cache:
        recorder = Recorder(str(path)).attach(cache)
        cache.acquire([1, 2, 3]).release()
        cache.acquire(np.zeros(MAX_REQUEST_TOKENS + 1, dtype=np.int32)).release()
        cache.acquire([4]).release()
        assert cache.stats().num_leases == 0
        with pytest.raises(TraceError, match=f"after 1 requests: {MAX_REQUEST_TOKENS + 1} tokens"):
            recorder.close()
    assert [request.num_in for request in read_trace(str(path))] == [3]
