"""`radixkv record`: convert a trace of any format to radixkv's msgpack format."""

from __future__ import annotations

import argparse

from radixkv.cli.common import TRACE_HELP, Command, ProgressLine, add_trace, binary_output, requests_of, say
from radixkv.traces.formats.msgpack import MsgpackWriter

__all__ = ["COMMAND"]


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    add_trace(parser)
    parser.add_argument("output", metavar="OUT", help="the msgpack trace to write; - is standard output")


def run(args: argparse.Namespace) -> int:
    """Write the requests."""
    number = 0
    with ProgressLine() as progress, binary_output(args.output) as stream:
        writer = MsgpackWriter(stream)
        for number, request in enumerate(requests_of(args), 1):
            writer.write(request)
            progress(number)
    say(f"{args.output}: {number:,} requests")
    return 0


COMMAND = Command(
    "record",
    "convert a trace of any format to radixkv's msgpack format",
    "radixkv record conversation_trace.jsonl conversation.msgpack",
    add,
    run,
    "It records no running cache: radixkv.traces.Recorder(path).attach(cache) does, in the program that owns the "
    "cache, and only while it is attached. " + TRACE_HELP,
)
