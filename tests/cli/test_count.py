"""Counts on the command line."""

import argparse

import pytest

from radixkv import cli
from radixkv.cli.common import count


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("100000", 100_000),
        ("100_000", 100_000),
        ("100k", 100_000),
        ("1.5M", 1_500_000),
        ("0.25g", 250_000_000),
        ("1.001k", 1001),
        ("2.0", 2),
    ],
)
def test_counts(text, value):
    assert count(text) == value


@pytest.mark.parametrize(
    "text", ["", "k", "x", "1.5", "1.0001k", "1.", ".5M", "1.5.0M", "1e3", "nan", "1.5kk", "-1.5k"]
)
def test_no_counts(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a count such as"):
        count(text)


@pytest.mark.parametrize("text", ["0", "-5", "0.0"])
def test_too_few(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is less than 1"):
        count(text)


@pytest.mark.parametrize("command", [["curve"], ["replay", "--capacity-tokens", "1000"]])
def test_a_workload_that_is_misspelt_is_told_the_others(command, capsys):
    assert cli.main([command[0], "agnt", *command[1:]]) == 1
    assert capsys.readouterr().err == "radixkv: agnt is neither a file nor a workload: these are agent, chat, fewshot\n"
