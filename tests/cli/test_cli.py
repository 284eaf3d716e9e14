"""The command line: every command, its JSON, its errors and exit statuses."""

import io
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import radixkv
from radixkv.cli import main
from radixkv.traces.curve import capacity_curve
from radixkv.traces.formats import read_trace
from radixkv.traces.replay import replay
from radixkv.traces.workload import generate

COMMANDS = ["replay", "curve", "generate", "record", "info", "doctor"]


def run(capsys, *arguments):
    """(exit status, standard output, standard error) of a command in this process."""
    status = main([str(argument) for argument in arguments])
    return (status, *capsys.readouterr())


def run_json(capsys, *arguments):
    status, out, err = run(capsys, *arguments, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


def shell(command):
    """Run a shell command in which ``$RADIXKV`` is the command line of this very package."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(radixkv.__file__).parents[1]),
        "RADIXKV": f"{sys.executable} -m radixkv",
    }
    return subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def trace(tmp_path):
    """A chat workload of 60 requests as JSON lines."""
    path = tmp_path / "chat.jsonl"
    assert main(["generate", "chat", "--requests", "60", "--seed", "3", "-o", str(path)]) == 0
    return path


def test_replay_prints_the_promised_object(capsys, trace):
    out = run_json(capsys, "replay", trace, "--capacity-tokens", "8k", "--page-size", 8)
    expected = replay(generate("chat", 60, seed=3), 8000, 8)
    assert out["trace"] == str(trace)
    for name in ("requests", "input_tokens", "hit_tokens", "hit_rate", "evicted_pages", "capacity_pages", "page_size"):
        assert out[name] == getattr(expected, name), name
    assert out["mode"] == "token-exact"
    assert out["seconds"] > 0
    assert out["hit_tokens"] > 0
    assert out["evicted_pages"] > 0


def test_replay_for_a_person(capsys, trace):
    status, out, err = run(capsys, "replay", trace, "--capacity-tokens", "500", "--page-aligned")
    assert (status, err) == (0, "")
    assert "60 requests" in out
    assert "page-aligned" in out
    assert "truncated" in out


def test_a_workload_needs_no_file(capsys, trace):
    arguments = ("--capacity-tokens", 20_000)
    from_file = run_json(capsys, "replay", trace, *arguments)
    made_up = run_json(capsys, "replay", "chat", "--requests", 60, "--seed", 3, *arguments)
    assert from_file["hit_tokens"] == made_up["hit_tokens"]
    assert run_json(capsys, "replay", "agent", "--requests", 5, *arguments)["requests"] == 5


def test_only_the_first_requests(capsys, trace):
    assert run_json(capsys, "replay", trace, "--requests", 7, "--capacity-tokens", 20_000)["requests"] == 7


def test_standard_input_is_a_trace(capsys, trace, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(trace.read_bytes())))
    assert run_json(capsys, "replay", "-", "--capacity-tokens", 20_000)["requests"] == 60


def test_block_size_of_a_mooncake_trace(capsys, tmp_path):
    path = tmp_path / "mooncake"
    line = {"timestamp": 0, "input_length": 40, "output_length": 9, "hash_ids": [0, 1, 2]}
    path.write_text((json.dumps(line) + "\n") * 2)
    out = run_json(capsys, "replay", path, "--block-size", 16, "--page-size", 16, "--capacity-tokens", 1024)
    assert (out["input_tokens"], out["hit_tokens"]) == (80, 39)
    status, _, err = run(capsys, "replay", path, "--capacity-tokens", 1024)
    assert status == 1
    assert "--block-size" in err


def test_curve_writes_csv_svg_and_json(capsys, trace, tmp_path):
    csv, svg = tmp_path / "c.csv", tmp_path / "c.svg"
    out = run_json(capsys, "curve", trace, "--page-size", 8, "--csv", csv, "--svg", svg, "--clairvoyant")
    expected = capacity_curve(generate("chat", 60, seed=3), 8)
    assert out["max_pages"] == expected.max_pages
    assert out["distinct_pages"] == expected.distinct_pages
    assert out["points"][-1] == [expected.max_pages, expected.hit_rate(expected.max_pages)]
    assert len(csv.read_text().splitlines()) == 1 + len(expected.points())
    picture = ET.parse(svg).getroot()
    lines = {line.get("class"): line.get("d") for line in picture.iter("{http://www.w3.org/2000/svg}path")}
    assert set(lines) == {"lru c0", "clairvoyant c1", "dots c1"}
    assert lines["dots c1"].count("M") > 25
    assert {"clairvoyant"} <= {text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")}
    for row in out["shares"]:
        assert row["hit_rate"] == expected.hit_rate(row["capacity_pages"]) <= row["clairvoyant"] + 1e-12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.csv", "c.svg", "chat.jsonl"]


def test_curves_of_several_traces_with_memory(capsys, trace, tmp_path):
    svg = tmp_path / "c.svg"
    more = ("--requests", 40, "--model", "llama-3-8b", "--format", "int8", "--hints", "--svg", svg)
    out = run_json(capsys, "curve", trace, "agent", *more)
    assert [each["trace"] for each in out["traces"]] == [str(trace), "agent"]
    for each in out["traces"]:
        for row in each["shares"]:
            assert row["bytes"] == row["capacity_pages"] * 16 * 65 * 1024
            assert "hints" in row
    text = {element.text for element in ET.parse(svg).getroot().iter("{http://www.w3.org/2000/svg}text")}
    assert {"agent", "LRU with hints", "above: memory for llama-3-8b in int8, 65 KiB a token"} <= text
    status, out, _ = run(capsys, "curve", trace, "agent", "--requests", 40, "--model", "llama-3-8b")
    assert status == 0
    assert out.count("trace  ") == 2
    assert "MiB" in out
    for arguments, message in (
        ((trace, "agent", "--csv", "-"), "a CSV has one curve"),
        (["chat"] * 9, "at most 8"),
        (("-", "-"), "standard input"),
        (("chat", "--model", "llama-9"), "neither a file nor a known model"),
    ):
        status, _, err = run(capsys, "curve", *arguments)
        assert status == 1
        assert message in err


def test_curve_for_a_person(capsys, trace):
    status, out, _ = run(capsys, "curve", trace)
    assert status == 0
    assert "footprint" in out
    assert "clairvoyant" not in out
    assert "100 %" in out


def test_curve_to_standard_output(capsys, trace):
    status, out, _ = run(capsys, "curve", trace, "--csv", "-", "--points", 5)
    assert status == 0
    assert 3 <= len(out.splitlines()) <= 6
    assert out.startswith("capacity_pages,")
    status, _, err = run(capsys, "curve", trace, "--csv", "-", "--json")
    assert status == 1
    assert "two outputs" in err


@pytest.mark.parametrize("name", ["t.jsonl", "t.msgpack"])
def test_generate_and_record_keep_every_token(capsys, tmp_path, name):
    path, recorded = tmp_path / name, tmp_path / "recorded"
    assert run(capsys, "generate", "agent", "--requests", 20, "--seed", 1, "-o", path)[0] == 0
    status, out, err = run(capsys, "record", path, recorded)
    assert (status, out) == (0, "")
    assert "20 requests" in err
    assert recorded.read_bytes()[1:15] == b"\xadradixkv-trace"
    for request, back in zip(generate("agent", 20, seed=1), read_trace(str(recorded)), strict=True):
        assert back.tokens_in.tolist() == request.tokens_in.tolist()
        assert back.tokens_out.tolist() == request.tokens_out.tolist()
        assert (back.session, back.timestamp) == (request.session, request.timestamp)


def test_a_failed_conversion_leaves_no_file_and_keeps_the_old_one(capsys, tmp_path):
    bad, target = tmp_path / "bad", tmp_path / "out"
    bad.write_text('{"input": [1]}\nbroken\n')
    assert run(capsys, "record", bad, target)[0] == 1
    assert not target.exists()
    target.write_text("old")
    assert run(capsys, "record", bad, target)[0] == 1
    assert target.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_trace_converts_onto_itself(capsys, trace):
    assert run(capsys, "record", trace, trace)[0] == 0
    assert len(list(read_trace(str(trace)))) == 60


def test_generate_refuses_an_unknown_ending(capsys, tmp_path):
    status, _, err = run(capsys, "generate", "chat", "-o", tmp_path / "x.csv")
    assert status == 1
    assert "end it in .jsonl or .msgpack" in err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read"),
        (b"PK\x03\x04", "is not a trace"),
        (b'{"input": [1]}\n{"inp', "line 2"),
        (b"", "holds no request"),
    ],
)
@pytest.mark.parametrize("command", [("replay", "--capacity-tokens", "100"), ("curve",)])
def test_a_bad_trace_is_one_line_and_status_one(capsys, tmp_path, content, words, command):
    path = tmp_path / "bad"
    if content is not None:
        path.write_bytes(content)
    status, out, err = run(capsys, *command, path)
    assert (status, out) == (1, "")
    assert err.startswith("radixkv: ")
    assert err.count("\n") == 1
    assert words in err


def test_a_capacity_below_a_page_is_refused(capsys):
    status, _, err = run(capsys, "replay", "chat", "--capacity-tokens", 5)
    assert status == 1
    assert "less than a page of 16" in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["replay"],
        ["replay", "chat"],
        ["replay", "chat", "--capacity-tokens", "many"],
        ["replay", "chat", "--capacity-tokens", "0"],
        ["replay", "chat", "--capacity-tokens", "100", "--page-size", "-1"],
        ["generate", "poem"],
        ["nonsense"],
    ],
)
def test_wrong_usage_is_status_two(capsys, arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage: radixkv" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(capsys, command):
    with pytest.raises(SystemExit) as error:
        main([command, "--help"])
    assert error.value.code == 0
    assert f"example: radixkv {command}" in " ".join(capsys.readouterr().out.split())


def test_version(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--version"])
    assert error.value.code == 0
    assert capsys.readouterr().out == f"radixkv {radixkv.__version__}\n"


def test_info_names_versions_and_the_backend(capsys):
    out = run_json(capsys, "info")
    assert out["radixkv"] == radixkv.__version__
    assert out["packages"]["numpy"]
    assert out["machine"]["isa"]
    assert out["attention"]["why"]
    status, text, _ = run(capsys, "info")
    assert status == 0
    assert out["attention"]["why"] in text


def test_info_without_torch(capsys, monkeypatch):
    monkeypatch.setattr("radixkv.cli.info._version", lambda package: None)
    out = run_json(capsys, "info")
    assert out["attention"]["backend"] is None
    assert "radixkv[engine]" in out["attention"]["why"]


def test_a_demo_without_its_packages_says_how_to_get_them(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "radixkv.demo", None)
    status, _, err = run(capsys, "demo")
    assert status == 1
    assert "pip install 'radixkv[demo]'" in err
    assert err.count("\n") == 1


def test_progress_is_shown_on_a_terminal_only(capsys, monkeypatch):
    monkeypatch.setattr("time.monotonic", iter(range(10**6)).__next__)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status, out, err = run(capsys, "replay", "chat", "--requests", 5, "--capacity-tokens", "1000", "--json")
    assert status == 0
    assert "5 requests" in err
    assert err.endswith("\r\x1b[K")
    assert json.loads(out)["requests"] == 5


def test_a_closed_pipe_ends_quietly():
    result = shell("$RADIXKV generate chat | head -c 10; echo status ${PIPESTATUS[0]}")
    assert result.stdout.endswith("status 141\n")
    assert result.stderr == ""


def test_commands_join_in_a_pipe_and_import_no_torch():
    watch = (
        "import sys; from radixkv.cli import main; s = main(sys.argv[1:]); assert 'torch' not in sys.modules; exit(s)"
    )
    result = shell(
        f"$RADIXKV generate agent --requests 20 | $RADIXKV record - - "
        f'| {sys.executable} -c "{watch}" curve - --page-size 8 --json'
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["requests"] == 20


def test_an_interrupt_is_status_130(capsys, monkeypatch):
    def interrupted(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("radixkv.cli.replay.replay", interrupted)
    assert run(capsys, "replay", "chat", "--capacity-tokens", 100)[0] == 130


def test_policies_of_a_workload(capsys):
    assert main(["policies", "chat", "--requests", "120", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [cell["percent_of_footprint"] for cell in found["cells"]] == [1, 2, 5, 10, 20, 50]
    assert found["cells"][3]["hint"] > found["cells"][3]["lru"]
    assert main(["policies", "chat", "--requests", "120"]) == 0
    printed = capsys.readouterr().out
    assert "points in the mean, worst" in printed
    assert "clairvoyant" in printed


def test_hints_and_policy_in_replay_and_curve(capsys):
    replay = ["replay", "chat", "--requests", "600", "--capacity-tokens", "8k", "--json"]
    rates = []
    for more in ([], ["--hints"], ["--policy", "hazard"]):
        assert main(replay + more) == 0
        rates.append(json.loads(capsys.readouterr().out)["hit_rate"])
    assert rates[1] > rates[0] != rates[2]
    assert main(["curve", "chat", "--requests", "200", "--hints", "--clairvoyant", "--json"]) == 0
    shares = json.loads(capsys.readouterr().out)["shares"]
    assert all(row["hints"] <= row["clairvoyant"] for row in shares)
    assert main(["curve", "chat", "--requests", "200", "--hints", "--svg", "-"]) == 0
    assert "with hints" in capsys.readouterr().out
