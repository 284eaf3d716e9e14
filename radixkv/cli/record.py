"""`radixkv record`: convert a trace of any format to radixkv's msgpack format."""

from __future__ import annotations

import argparse

from radixkv.cli.common import (
    TRACE_HELP,
    Command,
    ProgressLine,
    add_json,
    add_trace,
    binary_output,
    print_json,
    refuse_shared_output,
    requests_of,
    say,
)
from radixkv.traces.formats.msgpack import MsgpackWriter

__all__ = ["COMMAND"]


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    add_trace(parser)
    parser.add_argument("output", metavar="OUT", help="the msgpack trace to write; - is standard output")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Write the requests."""
    refuse_shared_output(args.output, "-" if args.json else None)
    number = 0
    with ProgressLine() as progress, binary_output(args.output) as stream:
        writer = MsgpackWriter(stream)
        for number, request in enumerate(requests_of(args, progress), 1):
            writer.write(request)
            progress(number)
    if args.json:
        print_json({"trace": args.trace, "output": args.output, "requests": number})
    else:
        say(f"{args.output}: {number:,} requests")
    return 0


COMMAND = Command(
    "record",
    "convert a trace of any format to radixkv's msgpack format (it records no running cache)",
    "radixkv record conversation_trace.jsonl conversation.msgpack",
    add,
    run,
    "What a running cache serves is recorded by radixkv.traces.Recorder(path).attach(cache) alone, in the program that "
    "owns the cache, while it is attached. " + TRACE_HELP,
)
