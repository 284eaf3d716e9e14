"""Trace files: every format is read back as written, and every bad file is refused with its place and a remedy."""

import io
import json

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radixkv import InvalidArgument, InvalidTokens, TraceError
from radixkv.traces.formats import read_trace
from radixkv.traces.formats.json import JsonWriter
from radixkv.traces.formats.msgpack import MsgpackWriter
from radixkv.traces.request import Blocks, TraceRequest

MAX_TOKEN = 2**31 - 1


def lines(*objects):
    return io.BytesIO("".join(json.dumps(line) + "\n" for line in objects).encode())


def read(*objects, **options):
    return list(read_trace(lines(*objects), **options))


def fields(request):
    blocks = request.blocks
    return (
        request.tokens_in.tolist(),
        request.tokens_out.tolist(),
        request.session,
        request.timestamp,
        request.namespace,
        blocks and (blocks.ids.tolist(), blocks.unit, blocks.length),
    )


def written(writer, requests):
    stream = io.BytesIO()
    target = writer(stream)
    for request in requests:
        target.write(request)
    return stream.getvalue()


tokens = st.lists(st.integers(0, MAX_TOKEN), max_size=20)
labels = {"session": st.text(max_size=5), "timestamp": st.floats(0, 1e9), "namespace": st.text(max_size=5)}
token_requests = st.lists(st.builds(TraceRequest, tokens.filter(bool), tokens, **labels), min_size=1, max_size=5)


@st.composite
def block_requests(draw):
    unit = draw(st.integers(2, 5))
    requests = []
    for _ in range(draw(st.integers(1, 5))):
        length = draw(st.integers(1, 20))
        num_ids = draw(st.sampled_from([length // unit, -(-length // unit)]))
        ids = draw(st.lists(st.integers(0, 2**30 - 1), min_size=num_ids, max_size=num_ids))
        blocks = Blocks(np.array(ids, dtype=np.int32), unit, length, draw(st.integers(0, MAX_TOKEN)))
        requests.append(TraceRequest(blocks=blocks, **{name: draw(value) for name, value in labels.items()}))
    return requests


@settings(deadline=None, max_examples=60)
@given(st.one_of(token_requests, block_requests()))
def test_msgpack_reads_back_what_was_written(requests):
    stream = io.BytesIO(written(MsgpackWriter, requests))
    assert [fields(request) for request in read_trace(stream)] == [fields(request) for request in requests]


@settings(deadline=None, max_examples=60)
@given(token_requests)
def test_json_lines_read_back_what_was_written(requests):
    stream = io.BytesIO(written(JsonWriter, requests))
    assert [fields(request) for request in read_trace(stream)] == [fields(request) for request in requests]


def test_json_lines_of_blocks_read_back_the_same_lengths_and_ids():
    request = TraceRequest(blocks=Blocks(np.array([7, 8], dtype=np.int32), 4, 10), session="s", namespace="n")
    (back,) = read_trace(io.BytesIO(written(JsonWriter, [request])))
    assert fields(back)[1:] == fields(request)[1:]


def test_mooncake_blocks_expand_to_tokens_that_match_whole_blocks_only():
    first, second = read(
        {"timestamp": 1500, "input_length": 10, "output_length": 3, "hash_ids": [0, 1, 2]},
        {"timestamp": 2500, "input_length": 8, "output_length": 3, "hash_ids": [0, 5]},
        block_size=4,
    )
    assert first.tokens_in.tolist() == [0] * 4 + [1] * 4 + [2] * 2
    assert second.tokens_in.tolist() == [0] * 4 + [5] * 4
    assert (first.timestamp, second.timestamp) == (1.5, 2.5)
    assert first.num_in == 10
    assert first.num_out == 0, "the file has the length of the output, not its tokens"


def test_mooncake_default_block_is_512_tokens():
    (request,) = read({"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [3, 4]})
    assert request.tokens_in.tolist() == [3] * 512 + [4]


def test_hashes_of_64_bits_become_distinct_tokens():
    large = [2**63 + 5, 2**40, 2**30, 2**31 - 1, 2**70]
    first, second = read(
        {"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": large},
        {"timestamp": 0, "input_length": 2, "output_length": 1, "hash_ids": [large[0], 2**30 - 1]},
        block_size=1,
    )
    assert len(set(first.tokens_in.tolist())) == 5
    assert second.tokens_in[0] == first.tokens_in[0]
    assert second.tokens_in[1] == 2**30 - 1


def test_unit_ids_leave_a_tail_that_no_other_request_has():
    line = {"timestamp": 1.5, "session": 7, "unit": 4, "input_length": 10, "output_length": 2, "ids": [3, 4]}
    first, second = read(line, line)
    assert first.tokens_in[:8].tolist() == [3] * 4 + [4] * 4
    assert first.num_in == len(first.tokens_in) == 10
    assert first.tokens_in[8] != second.tokens_in[8]
    assert (first.session, first.timestamp) == ("7", 1.5)


def test_unit_one_ids_are_the_input_and_then_the_output():
    line = {"timestamp": 0, "session": 0, "unit": 1, "input_length": 3, "output_length": 2, "ids": [5, 6, 7, 8, 9]}
    inputs_only = {"unit": 1, "input_length": 3, "output_length": 2, "ids": [5, 6, 7]}
    for request, output in zip(read(line, inputs_only), ([8, 9], []), strict=True):
        assert request.tokens_in.tolist() == [5, 6, 7]
        assert request.tokens_out.tolist() == output


def test_input_and_output_lists():
    with_output, without = read({"input": [1, 2], "output": [3], "session": "a", "namespace": "x"}, {"input": [4]})
    assert fields(with_output) == ([1, 2], [3], "a", 0.0, "x", None)
    assert fields(without) == ([4], [], "", 0.0, "", None)


def test_empty_lines_and_a_byte_order_mark_are_skipped():
    stream = io.BytesIO(b'\xef\xbb\xbf{"input":[1]}\n\n  \n{"input":[2]}')
    assert [request.tokens_in.tolist() for request in read_trace(stream)] == [[1], [2]]


def test_reading_is_lazy():
    stream = io.BytesIO(b'{"input":[1]}\n' * 5000 + b"broken\n")
    requests = read_trace(stream)
    assert next(requests).tokens_in.tolist() == [1]
    with pytest.raises(TraceError, match="line 5001"):
        list(requests)


GOOD = {"input_length": 8, "output_length": 1, "hash_ids": [1, 2], "timestamp": 0}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b"{'input': [1]}\n", "line 2: not JSON"),
        (b'{"timestamp": 0, "input_le', "cut short; remove the line"),
        (b"[1, 2]\n", "not a JSON object"),
        (b'{"text": "hello"}\n', "needs hash_ids, ids or input, has 'text'"),
        (b"\xff\xfe\n", "line 2: not JSON"),
        ({**GOOD, "hash_ids": [1, 2, 3]}, "give the trace's block size"),
        ({**GOOD, "hash_ids": [1]}, "1 hash_ids do not cover input_length 8"),
        ({**GOOD, "hash_ids": [1, -2]}, "an id is not negative"),
        ({**GOOD, "hash_ids": [1, "2"]}, "whole numbers only"),
        ({**GOOD, "hash_ids": [1, 2.5]}, "whole numbers only"),
        ({**GOOD, "hash_ids": [1, [2]]}, "flat list"),
        ({**GOOD, "hash_ids": [[1], [2]]}, "whole numbers"),
        ({**GOOD, "hash_ids": 5}, "must be a list of whole numbers, not 5"),
        ({**GOOD, "input_length": 0}, "input_length must be at least 1, not 0"),
        ({**GOOD, "input_length": "8"}, "input_length must be a whole number"),
        ({**GOOD, "input_length": True}, "input_length must be a whole number"),
        ({**GOOD, "timestamp": "noon"}, "timestamp must be a number"),
        ({"hash_ids": [1]}, "input_length must be a whole number, not None"),
        ({"input": [1]}, "a trace has one form"),
        ({"ids": [1], "unit": 4, "input_length": 4}, "a trace has one form"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(bad, words):
    bad = bad if isinstance(bad, bytes) else json.dumps(bad).encode() + b"\n"
    requests = read_trace(io.BytesIO(json.dumps(GOOD).encode() + b"\n" + bad), block_size=4)
    assert next(requests).num_in == 8
    with pytest.raises(TraceError, match="line 2: ") as error:
        list(requests)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"input": []}, "input is empty"),
        ({"input": [1, -1]}, "input holds -1: a token is from 0 to 2147483647"),
        ({"input": [2**31]}, "input holds 2147483648"),
        ({"input": [2**70]}, f"input holds {2**70}"),
        ({"input": [1], "output": [1.0]}, "output must be a flat list of whole numbers only, but holds float"),
        ({"input": [1], "output": [True]}, "whole numbers only, but holds bool"),
        ({"input": [1, True]}, "whole numbers only, but holds bool"),
        ({"input": [1, None, {}, "1"]}, "but holds NoneType, dict, str"),
        ({"input": "text"}, "must be a list of whole numbers, not 'text'"),
        ({"input": {"a": 1}}, "must be a list of whole numbers, not a dict of 1"),
        ({"unit": 1, "input_length": 3, "output_length": 2, "ids": [1, 2, 3, 4]}, "ids of unit 1 cover the input"),
        ({"unit": 1, "input_length": 3, "ids": [1, 2]}, "2 ids for input_length 3"),
        ({"unit": 1, "input_length": 3, "ids": []}, "ids is empty"),
        ({"unit": 4, "input_length": 9, "ids": [1]}, "one id for each full block (2)"),
        ({"unit": 0, "input_length": 9, "ids": [1]}, "unit must be at least 1"),
        ({"unit": 4, "ids": [1]}, "input_length must be a whole number"),
    ],
)
def test_a_bad_first_line_is_refused(bad, words):
    with pytest.raises(TraceError, match="line 1: ") as error:
        read(bad)
    assert words in str(error.value)


def test_deeply_nested_json_is_refused():
    with pytest.raises(TraceError, match="line 1"):
        list(read_trace(io.BytesIO(b'{"input":' + b"[" * 200_000)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no request"),
        (b"\n\n", "holds no request"),
        (b"PK\x03\x04 an archive", ".npz archive; convert"),
        (b"\x1f\x8b\x08 compressed", "decompress it"),
        (b'[{"input": [1]}]', "one JSON array"),
        (b"GGUF\x03\x00\x00\x00 a model", "expected JSON lines or a radixkv msgpack trace"),
        (msgpack.packb({"another": 1}), "expected JSON lines"),
        (msgpack.packb({"radixkv-trace": 2}), "version 2, this radixkv reads version 1"),
        (msgpack.packb({"radixkv-trace": 1}), "holds no request"),
    ],
)
def test_a_foreign_or_empty_file_is_refused(tmp_path, content, words):
    path = tmp_path / "trace"
    path.write_bytes(content)
    with pytest.raises(TraceError) as error:
        list(read_trace(str(path)))
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_a_msgpack_trace_cut_anywhere_is_refused_and_its_remedy_works():
    whole = written(MsgpackWriter, [TraceRequest([1, 2], [3]), TraceRequest([4], [])])
    header = len(msgpack.packb({"radixkv-trace": 1}))
    first = header + (len(whole) - header + 4 * 2) // 2  # the requests differ by two tokens
    for length in range(header + 1, len(whole)):
        if length == first:
            continue
        start = header if length < first else first
        with pytest.raises(TraceError, match=rf"byte {start}: .*head -c {start}"):
            list(read_trace(io.BytesIO(whole[:length])))
    assert len(list(read_trace(io.BytesIO(whole[:first])))) == 1


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (17, "a map was expected"),
        ({"out": b""}, "no 'in'"),
        ({"in": b"\x01\x00\x00", "out": b""}, "4-byte integers"),
        ({"in": b"\xff\xff\xff\xff", "out": b""}, "a token is not negative"),
        ({"in": b"", "out": b""}, "in is empty"),
        ({"in": "text", "out": b""}, "4-byte integers"),
        ({"in": bytes(4), "out": b"", "timestamp": "noon"}, "timestamp must be a number, not 'noon'"),
        ({"ids": bytes(8), "unit": 4, "length": 3, "tail": 0}, "2 ids do not fit length 3"),
        ({"ids": bytes(4), "unit": 0, "length": 3, "tail": 0}, "unit must be at least 1, not 0"),
        ({"ids": bytes(4), "unit": 2, "length": 2, "tail": -1}, "tail must be at least 0, not -1"),
        ({"ids": bytes(4), "unit": 2, "length": 2, "tail": 0.5}, "tail must be a whole number, not 0.5"),
        ({"ids": bytes(4), "unit": True, "length": 2, "tail": 0}, "unit must be a whole number, not True"),
        ({"ids": bytes(4), "unit": 2, "length": 2, "tail": 0}, "ids of unit 2 after tokens"),
    ],
)
def test_a_bad_msgpack_record_is_refused_with_its_byte(record, words):
    head = written(MsgpackWriter, [TraceRequest([1])])
    with pytest.raises(TraceError, match=f"byte {len(head)}: ") as error:
        list(read_trace(io.BytesIO(head + msgpack.packb(record))))
    assert words in str(error.value)


def test_msgpack_with_damaged_bytes_is_refused():
    head = written(MsgpackWriter, [TraceRequest([1])])
    with pytest.raises(TraceError, match=f"byte {len(head)}: not msgpack"):
        list(read_trace(io.BytesIO(head + b"\xc1\xc1")))


def test_a_path_that_cannot_be_read(tmp_path):
    with pytest.raises(TraceError, match=r"cannot read .*check the path"):
        list(read_trace(str(tmp_path / "missing")))
    with pytest.raises(TraceError, match="cannot read"):
        list(read_trace(str(tmp_path)))


def test_a_path_object_is_a_path(tmp_path):
    path = tmp_path / "trace"
    path.write_bytes(lines({"input": [1, 2]}).getvalue())
    assert [request.num_in for request in read_trace(path)] == [2]
    with pytest.raises(TraceError, match="embedded null byte"):
        list(read_trace("a\0b"))


def test_a_stream_in_text_mode_is_refused():
    with pytest.raises(InvalidArgument, match="reads as str, not bytes: open it in binary mode"):
        list(read_trace(io.StringIO('{"input": [1]}')))


@pytest.mark.parametrize("writer", [JsonWriter, MsgpackWriter])
def test_a_stream_that_comes_in_pieces_is_read(writer):
    class Drip(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 3))

    requests = [TraceRequest([1, 2], [3], session="s"), TraceRequest([4])]
    back = list(read_trace(Drip(written(writer, requests))))
    assert [fields(request) for request in back] == [fields(request) for request in requests]


def test_lines_may_end_as_on_windows():
    stream = io.BytesIO(b'{"input":[1]}\r\n\r\n{"input":[2]}\r\n')
    assert [request.tokens_in.tolist() for request in read_trace(stream)] == [[1], [2]]


def test_standard_input_is_read(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(lines({"input": [1, 2]})))
    assert [request.tokens_in.tolist() for request in read_trace("-")] == [[1, 2]]


def test_requests_refuse_what_is_no_token():
    for bad in ([-1], [2**31], [0.5], [[1]]):
        with pytest.raises(InvalidTokens):
            TraceRequest(bad)
    with pytest.raises(InvalidArgument):
        TraceRequest()
    with pytest.raises(InvalidArgument):
        TraceRequest([1], blocks=Blocks(np.array([1], dtype=np.int32), 4, 4))
    with pytest.raises(InvalidArgument):
        read({"input": [1]}, block_size=0)
