"""`radixkv view`: the cache over a trace, or as an operation log has it, as one HTML page."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np

from radixkv.cache import PrefixCache
from radixkv.cli.common import (
    TRACE_HELP,
    Command,
    ProgressLine,
    add_json,
    add_page_size,
    add_trace,
    count,
    decoder_of,
    print_json,
    printable,
    read_story,
    requests_of,
    say,
    seed,
    text_output,
)
from radixkv.errors import InvalidArgument
from radixkv.journal_log import is_log
from radixkv.observe import History, Timeline, history_of, timeline_html
from radixkv.traces.replay import replay
from radixkv.traces.request import TraceRequest

__all__ = ["COMMAND"]

_CAPACITY = 20_000


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    add_trace(parser)
    parser.add_argument(
        "--capacity-tokens",
        type=count,
        metavar="N",
        help=f"of the cache that serves a trace (default: {_CAPACITY})",
    )
    add_page_size(parser)
    parser.add_argument("--steps", type=seed, nargs=2, metavar=("A", "B"), help="of a log: from step A to step B")
    parser.add_argument("--tokenizer", metavar="PATH", help="a model's folder or tokenizer.json; shows text for ids")
    parser.add_argument("-o", "--output", metavar="FILE", help="FILE.html; - prints it (default)")
    add_json(parser, "print the runs of pages and the steps as one JSON object; a page is written to FILE alone")


def run(args: argparse.Namespace) -> int:
    """Replay the trace or read the log, and write the page."""
    output = args.output or (None if args.json else "-")
    if args.json and output == "-":
        raise InvalidArgument("two outputs cannot share standard output: give -o a file")
    history, what = _of_log(args) if is_log(args.trace) else _of_trace(args)
    if output is not None:
        with ProgressLine() as progress:
            progress.show("making the page")
            page = timeline_html(history, decoder_of(args.tokenizer), f"{printable(args.trace)}: {what}")
        with text_output(output) as stream:
            stream.write(page)
        if output != "-":
            say(f"{output}: {what}, {len(page) / 2**20:.1f} MiB; open it in a browser")
    if args.json:
        print_json({"source": args.trace, **_as_object(history)})
    return 0


def _of_log(args: argparse.Namespace) -> tuple[History, str]:
    if args.capacity_tokens or args.requests:
        raise InvalidArgument(
            f"{args.trace} is an operation log, which has a pool and requests of its own: leave out "
            "--capacity-tokens and --requests; --steps A B shows a part"
        )
    story = read_story(args.trace)
    history = history_of(story, *(args.steps or ()))
    requests = sum(moment.request > 0 for moment in history.moments)
    return history, f"{requests:,} requests, {story.num_pages:,} pages of {story.page_size} tokens"


def _of_trace(args: argparse.Namespace) -> tuple[History, str]:
    """What a cache held after each request."""
    if args.steps:
        raise InvalidArgument(f"--steps is for an operation log, and {args.trace} is none: give --requests N instead")
    made: list[Timeline] = []
    served: list[TraceRequest] = []

    def make_cache(num_pages: int, page_size: int) -> PrefixCache:
        made.append(Timeline(PrefixCache(num_pages, page_size)))
        return made[0].cache

    with ProgressLine() as progress:

        def each() -> Iterator[TraceRequest]:
            for request in requests_of(args, progress):
                served[:] = [request]
                yield request

        def mark(done: int) -> None:
            tokens = np.concatenate([served[0].tokens_in, served[0].tokens_out])
            made[0].mark(tokens, served[0].namespace)
            progress(done)

        replay(each(), args.capacity_tokens or _CAPACITY, args.page_size, progress=mark, make_cache=make_cache)
    return made[0], f"{len(made[0].uses) - 1:,} requests, pages of {args.page_size} tokens"


def _as_object(history: History) -> dict[str, Any]:
    """The history as one JSON object. A run is there from step ``born`` to the one before ``died``; -1: to the end."""
    runs = [
        {"parent": run.parent, "namespace": run.namespace, "pages": run.num_pages, "born": run.born, "died": run.died,
         "tokens": run.tokens.tolist()} for run in history.runs
    ]  # fmt: skip
    moments = [moment._asdict() for moment in history.moments] or [{"request": i} for i in range(len(history.uses))]
    steps = [{"last_run": use, **moment} for use, moment in zip(history.uses, moments, strict=True)]
    return {"num_pages": history.num_pages, "steps": steps, "runs": runs}


COMMAND = Command(
    "view",
    "a cache serving a trace, or one that wrote an operation log, as one HTML page to look at, search and move through",
    "radixkv view cache.log -o cache.html",
    add,
    run,
    "An operation log is what PrefixCache.record(FILE) writes: the page steps through the states that it recorded. "
    "Of a running cache: radixkv.observe.tree_html(cache.snapshot(), tokenizer.decode). " + TRACE_HELP,
)
