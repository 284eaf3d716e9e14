"""`radixkv view`: the cache over a trace, as one HTML page."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator

import numpy as np

from radixkv.cache import PrefixCache
from radixkv.cli.common import (
    TRACE_HELP,
    Command,
    ProgressLine,
    add_page_size,
    add_trace,
    count,
    printable,
    requests_of,
    say,
    text_output,
)
from radixkv.observe import timeline_html
from radixkv.observe.timeline import Timeline
from radixkv.traces.replay import replay
from radixkv.traces.request import TraceRequest

__all__ = ["COMMAND"]


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    add_trace(parser)
    parser.add_argument(
        "--capacity-tokens", type=count, default=20_000, metavar="N", help="size of the cache (default: %(default)s)"
    )
    add_page_size(parser)
    parser.add_argument("-o", "--output", default="-", metavar="FILE", help="FILE.html; - prints it (default)")


def run(args: argparse.Namespace) -> int:
    """Replay the trace, and write the page."""
    timeline, requests = _watch(requests_of(args), args.capacity_tokens, args.page_size)
    what = f"{printable(args.trace)}: {requests:,} requests, pages of {args.page_size} tokens"
    page = timeline_html(timeline, title=what)
    with text_output(args.output) as stream:
        stream.write(page)
    if args.output != "-":
        say(f"{args.output}: {requests:,} requests, {len(page) / 2**20:.1f} MiB; open it in a browser")
    return 0


def _watch(requests: Iterable[TraceRequest], capacity_tokens: int, page_size: int) -> tuple[Timeline, int]:
    """What a cache held after each request, and how many there were."""
    made: list[Timeline] = []
    served: list[TraceRequest] = []

    def make_cache(num_pages: int, page_size: int) -> PrefixCache:
        made.append(Timeline(PrefixCache(num_pages, page_size)))
        return made[0].cache

    def each() -> Iterator[TraceRequest]:
        for request in requests:
            served[:] = [request]
            yield request

    with ProgressLine() as progress:

        def mark(done: int) -> None:
            tokens = np.concatenate([served[0].tokens_in, served[0].tokens_out])
            made[0].mark(tokens, served[0].namespace)
            progress(done)

        replay(each(), capacity_tokens, page_size, progress=mark, make_cache=make_cache)
    return made[0], len(made[0].uses) - 1


COMMAND = Command(
    "view",
    "a cache serving a trace, as one HTML page to look at, search and move through",
    "radixkv view chat --requests 200 --capacity-tokens 30k -o cache.html",
    add,
    run,
    "Of a running cache: radixkv.observe.tree_html(cache.snapshot(), tokenizer.decode). " + TRACE_HELP,
)
