"""`radixkv generate`: make up a workload."""

from __future__ import annotations

import argparse

from radixkv.cli.common import (
    Command,
    ProgressLine,
    add_json,
    binary_output,
    count,
    print_json,
    refuse_shared_output,
    seed,
)
from radixkv.errors import InvalidArgument
from radixkv.traces.formats.json import JsonWriter
from radixkv.traces.formats.msgpack import MsgpackWriter
from radixkv.traces.workload import WORKLOADS, generate

__all__ = ["COMMAND"]


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("kind", choices=list(WORKLOADS), help="multi-turn chat, few-shot prompts, or agent loops")
    parser.add_argument("--requests", type=count, default=1000, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=0, metavar="S", help="default: %(default)s")
    parser.add_argument(
        "-o", "--output", default="-", metavar="FILE", help="FILE.jsonl or FILE.msgpack; - prints JSON lines (default)"
    )
    add_json(parser, "print one JSON object; needs -o FILE")


def run(args: argparse.Namespace) -> int:
    """Write the requests."""
    if args.output != "-" and not args.output.endswith((".jsonl", ".json", ".msgpack")):
        raise InvalidArgument(f"{args.output}: the name says the format: end it in .jsonl or .msgpack")
    refuse_shared_output(args.output, "-" if args.json else None)
    requests = generate(args.kind, args.requests, args.seed)
    with ProgressLine(total=args.requests) as progress, binary_output(args.output) as stream:
        writer = MsgpackWriter(stream) if args.output.endswith(".msgpack") else JsonWriter(stream)
        for number, request in enumerate(requests, 1):
            writer.write(request)
            progress(number)
    if args.json:
        print_json({"workload": args.kind, "seed": args.seed, "output": args.output, "requests": args.requests})
    return 0


COMMAND = Command(
    "generate",
    "make up a workload with outputs, the same for the same seed",
    "radixkv generate chat --requests 5000 --seed 1 -o chat.msgpack",
    add,
    run,
)
