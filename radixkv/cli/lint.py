"""`radixkv lint`: what keeps the requests of a session from sharing more."""

from __future__ import annotations

import argparse

from radixkv.cli.common import TRACE_HELP, Command, ProgressLine, add_trace, count, print_json, printable, requests_of
from radixkv.traces.lint import Report, lint

__all__ = ["COMMAND"]


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    add_trace(parser)
    parser.add_argument("--top", type=count, default=10, metavar="N", help="show the dearest N (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Compare the requests; print what broke."""
    with ProgressLine() as progress:
        report = lint(requests_of(args, progress), progress)
    if args.json:
        print_json({"trace": args.trace, **report.to_dict()})
    else:
        _print(args.trace, report, args.top)
    return 0


def _print(trace: str, report: Report, top: int) -> None:
    broken = sum(found.times for found in report.breaks)
    share = 100 * report.lost_tokens / max(1, report.input_tokens)
    print(
        f"trace       {printable(trace)}: {report.requests:,} requests, {report.followers:,} follow another of theirs"
    )
    print(f"broken      {broken:,} do not begin with the prompt before them")
    print(f"lost        {report.lost_tokens:,} tokens computed again, {share:.1f} % of all input tokens")
    if report.breaks:
        print(f"\n{'at token':>9}  {'what':<10}{'times':>7}{'lost tokens':>13}  {'first':>7}  tokens there")
    for found in report.breaks[:top]:
        there = f"{found.before} became {found.after}".replace("-1", "the end")
        counts = f"{found.times:>7,}{found.lost_tokens:>13,}  {found.request:>7,}"
        print(f"{found.position:>9,}  {found.kind:<10}{counts}  {there}")
    if len(report.breaks) > top:
        print(f"{len(report.breaks) - top:,} more: --top, or --json for all")


COMMAND = Command(
    "lint",
    "what keeps the requests of a session from sharing their beginning: timestamps, rewritten history, moved tools",
    "radixkv lint recorded.msgpack --top 5",
    add,
    run,
    "A request should begin with its session's previous prompt. What of the rest stood there as well is lost. "
    + TRACE_HELP,
)
