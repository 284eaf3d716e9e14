"""What broke a prefix: every kind of break, its place and its cost, and no false alarm."""

from __future__ import annotations

import json

import numpy as np
import pytest

from radixkv.cli import main
from radixkv.errors import InvalidArgument
from radixkv.traces.lint import lint
from radixkv.traces.request import Blocks, TraceRequest
from radixkv.traces.workload import generate

SYSTEM, TOOLS, HISTORY = list(range(100, 150)), list(range(200, 240)), list(range(300, 400))


def found(*prompts, outputs=None):
    outputs = outputs or [[]] * len(prompts)
    return lint(TraceRequest(p, o, session="s") for p, o in zip(prompts, outputs, strict=True))


@pytest.mark.parametrize(
    ("kind", "before", "after", "position", "lost"),
    [
        ("replaced", [1, 2, 3, *SYSTEM], [1, 9, 3, *SYSTEM], 1, 51),
        ("inserted", [1, *SYSTEM], [1, 7, 8, *SYSTEM], 1, 50),
        ("removed", [1, *HISTORY, *SYSTEM], [1, *SYSTEM, 5], 1, 50),
        ("moved", [1, *TOOLS, *SYSTEM], [1, *SYSTEM, *TOOLS], 1, 90),
        ("rewritten", [1, *HISTORY], [1, *TOOLS], 1, 0),
        ("replaced", [*SYSTEM, 17, *HISTORY], [*SYSTEM, 18, *HISTORY, 4], 50, 100),
    ],
)
def test_a_break_is_found_named_and_counted(kind, before, after, position, lost):
    report = found(before, after)
    (only,) = report.breaks
    assert (only.kind, only.position, only.lost_tokens) == (kind, position, lost)
    assert (only.before, only.after, only.request, only.times) == (before[position], after[position], 2, 1)
    assert report.lost_tokens == lost


def test_a_timestamp_in_every_request_is_one_finding():
    prompts = [[1, 1000 + turn, *SYSTEM, *HISTORY[: 20 * turn]] for turn in range(5)]
    report = found(*prompts)
    (only,) = report.breaks
    assert (only.kind, only.position, only.times) == ("replaced", 1, 4)
    assert only.lost_tokens == sum(50 + 20 * turn for turn in range(4))


def test_what_goes_on_is_no_break():
    """Nor is an answer that the client left out, another answer than the trace has, or a shorter retry."""
    assert found([1, *SYSTEM], [1, *SYSTEM, 2, 3], outputs=[[7, 8], []]).breaks == []
    assert found([1, *SYSTEM], [1, *SYSTEM, 7, 8, 3], outputs=[[7, 8], []]).breaks == []
    assert found([1, *SYSTEM], [1, *SYSTEM], [1, *SYSTEM[:9]]).breaks == []
    report = lint(generate("chat", 200, seed=0))
    assert (report.requests, report.breaks, report.lost_tokens) == (200, [], 0)
    assert report.followers > 50


def test_a_block_that_is_not_full_has_another_id_when_it_is():
    first = Blocks(np.array([1, 2, 3], dtype=np.int32), 16, 40)
    grown = Blocks(np.array([1, 2, 4, 5], dtype=np.int32), 16, 64)
    other = Blocks(np.array([1, 6, 7, 8], dtype=np.int32), 16, 64)
    report = lint(TraceRequest(blocks=blocks, session="s") for blocks in (first, grown, other))
    (only,) = report.breaks
    assert (only.kind, only.position, only.request) == ("rewritten", 16, 3)


def test_sessions_and_namespaces_are_apart():
    requests = [TraceRequest([1, *SYSTEM], session="a"), TraceRequest([2, *SYSTEM], session="b")]
    requests += [TraceRequest([3, *SYSTEM], session="a", namespace="n"), TraceRequest([4, *SYSTEM])]
    report = lint(requests)
    assert (report.followers, report.breaks) == (0, [])


def test_without_sessions_nothing_can_be_said():
    with pytest.raises(InvalidArgument, match="names its session"):
        lint([TraceRequest([1, 2])])
    assert lint([]).breaks == []


def test_the_command(capsys, tmp_path):
    file = tmp_path / "t.jsonl"
    lines = [{"input": [1, 1000 + i, *SYSTEM], "session": "s"} for i in range(3)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["lint", str(file)]) == 0
    out = capsys.readouterr().out
    assert "2 do not begin" in out
    assert "1000 became 1001" in out
    assert main(["lint", str(file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["breaks"][0]["times"] == 2
    assert report["lost_tokens"] == 2 * len(SYSTEM)


def test_long_requests_are_compared_in_time():
    rng = np.random.default_rng(0)
    text = rng.integers(0, 50_000, 400_000, dtype=np.int32)
    report = found(np.r_[1, text], np.r_[2, text])
    assert report.lost_tokens == 400_000
