"""`radixkv replay`: serve a trace one request at a time and report the hit rate."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from radixkv.cache import PrefixCache
from radixkv.cli.common import (
    TRACE_HELP,
    Command,
    ProgressLine,
    add_page_size,
    add_trace,
    count,
    print_json,
    printable,
    requests_of,
)
from radixkv.journal_log import LogWriter
from radixkv.traces.replay import ReplayResult, replay

__all__ = ["COMMAND"]


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    add_trace(parser)
    parser.add_argument(
        "--capacity-tokens", type=count, required=True, metavar="N", help="size of the cache, as 100000 or 100k"
    )
    add_page_size(parser)
    parser.add_argument(
        "--page-aligned",
        action="store_true",
        help="count and insert full pages only, as `radixkv curve` and published figures do",
    )
    parser.add_argument(
        "--policy", choices=("lru", "hazard"), default="lru", help="what is evicted first (default: %(default)s)"
    )
    parser.add_argument(
        "--hints", action="store_true", help="tell the cache where sessions end; keeps the trace in memory"
    )
    parser.add_argument(
        "--log", metavar="FILE", help="also write the cache's operation log: `radixkv log`, `radixkv view`"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Replay the trace; print the result."""
    with ExitStack() as stack:
        progress = stack.enter_context(ProgressLine())
        logs: list[LogWriter] = []

        def make_cache(num_pages: int, page_size: int) -> PrefixCache:
            cache = PrefixCache(num_pages, page_size, args.policy)
            if args.log is not None:
                logs.append(stack.enter_context(cache.record(args.log)))
            return cache

        def tell(done: int) -> None:
            for log in logs:
                log.pump()
            progress(done)

        requests = requests_of(args, progress)
        result = replay(
            requests, args.capacity_tokens, args.page_size, args.page_aligned, tell, make_cache, hints=args.hints
        )
    if args.json:
        print_json({"trace": args.trace, "policy": args.policy, **result.to_dict()})
    else:
        _print(args.trace, args.policy, result)
    return 0


def _print(trace: str, policy: str, result: ReplayResult) -> None:
    mode = "page-aligned" if result.page_aligned else "token-exact"
    print(f"trace         {printable(trace)}: {result.requests:,} requests, {result.input_tokens:,} input tokens")
    print(
        f"cache         {result.capacity_pages:,} pages of {result.page_size} tokens "
        f"({result.capacity_pages * result.page_size:,} tokens), {mode}, {policy}"
        + (" with hints" if result.hints else "")
    )
    print(f"hit rate      {100 * result.hit_rate:.2f} % ({result.hit_tokens:,} tokens)")
    print(f"evicted       {result.evicted_pages:,} pages")
    if result.truncated_requests:
        print(f"truncated     {result.truncated_requests:,} requests longer than the cache kept its first pages only")
    print(f"time          {result.seconds:.2f} s, of which {result.cache_seconds:.2f} s in the cache")


COMMAND = Command(
    "replay",
    "serve a trace one request at a time and report the hit rate",
    "radixkv replay chat --capacity-tokens 100k --json",
    add,
    run,
    TRACE_HELP,
)
