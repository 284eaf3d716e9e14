"""The command line where streams, disks and people misbehave: one line, the conventional status, never a traceback."""

import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import radixkv
from radixkv.cli import main

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(radixkv.__file__).parents[1]),
    "RADIXKV": f"{sys.executable} -m radixkv",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "",
}


def shell(command, cwd=None):
    """(status of the first command of a pipe, standard output, standard error)."""
    result = subprocess.run(
        ["bash", "-c", command + "; exit ${PIPESTATUS[0]}"],
        env=ENVIRONMENT, capture_output=True, text=True, errors="replace", timeout=60, check=False, cwd=cwd,
    )  # fmt: skip
    return result.returncode, result.stdout, result.stderr


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    return (status, *capsys.readouterr())


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "chat.jsonl"
    assert main(["generate", "chat", "--requests", "20", "-o", str(path)]) == 0
    return path


CHAT = "$RADIXKV replay chat --requests 5 --capacity-tokens 9k"


@pytest.mark.parametrize(
    "command",
    [
        "$RADIXKV generate chat --requests 9999 | head -1",
        "$RADIXKV curve chat --requests 50 --csv - | true",
        "$RADIXKV curve chat --requests 50 --csv /dev/stdout | true",
        "$RADIXKV record chat - | head -c 1",
        f"{CHAT} | true",
        f"{CHAT} --json | true",
        "$RADIXKV --help | true",
        "$RADIXKV curve --help | true",
    ],
)
def test_a_reader_that_is_gone_is_status_141_and_no_word(command):
    status, _, err = shell(command)
    assert (status, err) == (141, "")


@pytest.mark.parametrize("command", [CHAT, "$RADIXKV generate chat", "$RADIXKV --help", "$RADIXKV curve chat --svg -"])
def test_a_full_disk_behind_standard_output(command):
    assert shell(f"{command} > /dev/full") == (
        1, "", "radixkv: cannot write standard output: No space left on device\n"
    )  # fmt: skip


def test_closed_streams():
    status, out, err = shell("$RADIXKV generate chat --requests 2 >&-")
    assert (status, out, err) == (1, "", "radixkv: cannot write standard output: it is closed\n")
    assert shell(f"{CHAT} >&-") == (0, "", "")
    status, _, err = shell("$RADIXKV curve - <&-")
    assert status == 1
    assert err == "radixkv: cannot read standard input: it is closed: name a file\n"
    status, out, _ = shell(f"{CHAT} 2>&-")
    assert status == 0
    assert "hit rate" in out
    assert shell("$RADIXKV curve missing 2>&-") == (1, "", "")
    assert shell("$RADIXKV curve missing 2>/dev/full") == (1, "", "")


def wait_until_it_runs(pid: int) -> None:
    """Until it has used as much time as Python needs to start, and some more; then it works, or waits for its input."""
    deadline = time.monotonic() + 60
    ticks = 0.0
    while ticks < 0.25 * os.sysconf("SC_CLK_TCK") and time.monotonic() < deadline:
        time.sleep(0.05)
        ticks = sum(int(field) for field in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])
    time.sleep(0.5)


@pytest.mark.parametrize(
    "command",
    [
        "$RADIXKV generate chat --requests 99999999 > /dev/null",
        "$RADIXKV generate chat --requests 99999999 -o out.jsonl",
        "$RADIXKV replay chat --requests 99999999 --capacity-tokens 100k",
        "$RADIXKV curve agent --requests 99999999 --csv out.csv",
        "$RADIXKV curve - < fifo",
    ],
)
def test_an_interrupt_is_status_130_and_leaves_nothing(tmp_path, command):
    os.mkfifo(tmp_path / "fifo")
    process = subprocess.Popen(
        ["bash", "-c", f"touch started; exec {command}"],
        env=ENVIRONMENT, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job of a shell ignores it
    )  # fmt: skip
    writer = os.open(tmp_path / "fifo", os.O_RDWR)  # so that nobody waits for a writer
    try:
        wait_until_it_runs(process.pid)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        os.close(writer)
    assert (process.returncode, out, err) == (130, b"", b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "started"]


@pytest.mark.parametrize(
    "command",
    [
        ("curve", "--svg", "no/c.svg"),
        ("curve", "--csv", "no/c.csv"),
        ("record", "no/t"),
    ],
)
def test_an_output_in_a_folder_that_is_not_there(capsys, trace, monkeypatch, command):
    monkeypatch.chdir(trace.parent)
    name, *rest = command
    status, out, err = run(capsys, name, trace, *rest)
    assert (status, out) == (1, "")
    assert err == (
        f"radixkv: cannot write {rest[-1]}: No such file or directory: "
        "check the folder, its permissions and the room on the disk\n"
    )


def test_an_output_that_is_a_folder_or_a_full_disk(capsys, trace):
    status, _, err = run(capsys, "record", trace, trace.parent)
    assert status == 1
    assert f"cannot write {trace.parent}: Is a directory" in err
    status, _, err = run(capsys, "record", trace, "/dev/full")
    assert status == 1
    assert "cannot write /dev/full: No space left on device" in err


def test_an_output_keeps_its_neighbours_and_goes_where_a_link_leads(capsys, trace, tmp_path):
    (tmp_path / "out.part").write_text("mine")
    (tmp_path / "real").write_text("old")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    assert run(capsys, "record", trace, tmp_path / "out")[0] == 0
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real").read_bytes() != b"old"
    assert (tmp_path / "out.part").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.jsonl", "out", "out.part", "real"]


def test_two_outputs_of_one_name_are_refused(capsys, trace, tmp_path):
    status, _, err = run(capsys, "curve", trace, "--csv", tmp_path / "x", "--svg", tmp_path / "x")
    assert status == 1
    assert "two outputs" in err
    status, _, err = run(capsys, "curve", trace, "--csv", "")
    assert status == 1
    assert "cannot write" in err


def test_file_names_that_are_no_text(trace):
    status, out, err = shell(
        r"""mv chat.jsonl $'\xff\x01.jsonl' && $RADIXKV curve $'\xff\x01.jsonl' --svg c.svg""", cwd=trace.parent
    )
    assert (status, err) == (0, "")
    assert r"\udcff" in out
    title = ET.parse(trace.parent / "c.svg").getroot().find("{*}text")
    assert title.text == "\ufffd\ufffd.jsonl: hit rate by capacity"


@pytest.mark.parametrize("page_size", ["99999999999", "1000G"])
def test_a_page_that_no_request_fills_is_refused(capsys, trace, page_size):
    for more in ((), ("--json",), ("--clairvoyant",)):
        status, out, err = run(capsys, "curve", trace, "--page-size", page_size, *more)
        assert (status, out) == (1, "")
        assert "fills a page" in err
        assert "lower --page-size" in err


def test_a_capacity_beyond_a_cache_is_refused_in_tokens(capsys, trace):
    status, _, err = run(capsys, "replay", trace, "--capacity-tokens", "3G")
    assert status == 1
    assert "a capacity of 3000000000 tokens: a cache holds less than 2**31" in err


def test_a_cache_that_does_not_fit_into_memory():
    status, out, err = shell("ulimit -v 3000000; $RADIXKV replay chat --capacity-tokens 2147483647")
    assert (status, out) == (1, "")
    assert err.startswith("radixkv: out of memory (")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["curve", "chat", "--points", "1"],
        ["replay", "chat", "--capacity-tokens", "9k", "--seed", "-1"],
        ["generate", "chat", "--seed", "nan"],
        ["doctor", "--seed", "-1"],
        ["doctor", "--batches", "0"],
        ["curve", "chat", "--page-size", "9" * 5000],
        ["curve", "chat", "--requests", "1.5"],
    ],
)
def test_numbers_that_cannot_be_are_wrong_usage(capsys, arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert len(capsys.readouterr().err.splitlines()[-1]) < 200
