"""Every command: `--json` prints one JSON object and nothing else, and what takes long shows how far it is."""

from __future__ import annotations

import argparse
import json
import re
import sys

import pytest

import radixkv
from radixkv.cli import COMMANDS, main
from tests.tiers.test_tiers import stored

MODEL_NEEDED = {
    "demo": "tests/test_demo.py::test_json_report_of_a_tiny_model",
    "kv-check": "tests/hf/test_kv_check_smollm2.py",
}
"""Commands that load a model, and the tests that run them with --json."""

TRACE, LOG, OUT, DISK = "TRACE", "LOG", "OUT", "DISK"
ARGUMENTS = {
    "replay": (TRACE, "--capacity-tokens", "2000"),
    "curve": (TRACE, "--clairvoyant", "--hints"),
    "policies": (TRACE,),
    "plan": ("llama-3-8b", "--trace", TRACE, "--target", "0.3"),
    "view": (TRACE,),
    "lint": (TRACE,),
    "log": (LOG, "--explain", "1 2 3"),
    "generate": ("chat", "--requests", "3", "-o", OUT),
    "record": (TRACE, OUT),
    "tiers": (DISK, "--verify"),
    "info": (),
    "doctor": ("--batches", "1", "--dtype", "float32", "--device", "cpu"),
}


@pytest.fixture
def arguments(tmp_path):
    """What to give a command, with files for the names."""
    files = {
        TRACE: tmp_path / "chat.jsonl",
        LOG: tmp_path / "log",
        OUT: tmp_path / "out.msgpack",
        DISK: tmp_path / "disk",
    }
    stored(files[DISK])
    assert main(["generate", "chat", "--requests", "40", "-o", str(files[TRACE])]) == 0
    cache = radixkv.PrefixCache(4, 2)
    with cache.record(str(files[LOG])):
        for i in range(5):
            with cache.acquire([1, 2, i, i]) as lease:
                lease.advance()
    return lambda name: [name, *(str(files.get(word, word)) for word in ARGUMENTS[name])]


def test_none_is_forgotten():
    assert {command.name for command in COMMANDS} == set(ARGUMENTS) | set(MODEL_NEEDED)
    for command in COMMANDS:
        parser = argparse.ArgumentParser()
        command.add(parser)
        assert any("--json" in action.option_strings for action in parser._actions), command.name


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_json_is_one_object_and_nothing_else(capsys, arguments, name):
    if name == "doctor":
        pytest.importorskip("torch")
    capsys.readouterr()
    assert main([*arguments(name), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    assert isinstance(json.loads(out), dict)


@pytest.mark.parametrize("name", ["generate", "record"])
def test_data_and_json_do_not_share_standard_output(capsys, arguments, name):
    given = ["-" if word.endswith("out.msgpack") else word for word in arguments(name)]
    capsys.readouterr()
    assert main([*given, "--json"]) == 1
    assert "two outputs cannot share standard output" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_what_takes_long_shows_how_far_it_is(capsys, arguments, monkeypatch, name):
    """On a terminal: a bar, but for what cannot be counted."""
    if name == "doctor":
        pytest.importorskip("torch")
    given = arguments(name)
    capsys.readouterr()
    monkeypatch.setattr("time.monotonic", iter(range(10**7)).__next__)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([*given, "--json"]) == 0
    shown = capsys.readouterr().err
    assert shown.endswith("\r\x1b[K")
    if name == "info":
        assert "importing torch" in shown
        return
    shares = [int(share) for share in re.findall(r"\[[#.]{30}\] (\d+) % ", shown)]
    assert shares
    assert all(0 <= share <= 100 for share in shares)
    assert max(shares) == 100


def test_record_says_that_it_records_no_running_cache(capsys):
    with pytest.raises(SystemExit):
        main(["record", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "it records no running cache" in text
    assert "radixkv.traces.Recorder(path).attach(cache) alone" in text
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "it records no running cache" in " ".join(capsys.readouterr().out.split())
