"""`radixkv policies`: what each policy of eviction gives on a trace, and what is left to the bound."""

from __future__ import annotations

import argparse

from radixkv.cli.common import (
    TRACE_HELP,
    Command,
    ProgressLine,
    add_page_size,
    add_trace,
    all_requests,
    print_json,
    printable,
)
from radixkv.traces.policies import POLICIES, Comparison, compare_policies

__all__ = ["COMMAND"]


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    add_trace(parser)
    add_page_size(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Replay the trace with each policy; print the table."""
    requests = all_requests(args)
    with ProgressLine() as progress:
        found = compare_policies(requests, args.page_size, progress)
    if args.json:
        print_json({"trace": args.trace, **found.to_dict()})
    else:
        _print(args.trace, found)
    return 0


def _print(trace: str, found: Comparison) -> None:
    page, names = found.page_size, ["lru", *POLICIES]
    print(f"trace       {printable(trace)}: {found.requests:,} requests")
    print(f"footprint   {found.distinct_pages:,} pages of {page} tokens ({found.distinct_pages * page:,} tokens)")
    heads = "".join(f"{name:>9}" for name in names)
    print(f"\n{'footprint':>9}  {'tokens':>13}{heads}  clairvoyant  {'gap':>6}   (hit rates in %)")
    for cell in found.cells:
        rates = "".join(f"{100 * cell.rates[name]:>9.2f}" if name in cell.rates else f"{'-':>9}" for name in names)
        line = f"{cell.percent_of_footprint:>7} %  {cell.capacity_pages * page:>13,}{rates}"
        print(f"{line}  {100 * cell.clairvoyant:>11.2f}  {100 * cell.gap:>6.2f}")
    print()
    for name in POLICIES:
        if name not in found.cells[0].rates:
            print(f"{name:<8}    not known: {found.no_hints}")
            continue
        gain, cell = found.worst(name)
        mean = sum(c.rates[name] - c.rates["lru"] for c in found.cells) / len(found.cells)
        verdict = "LOSES" if name in found.losing() else "worst"
        worst = f"{verdict} {100 * gain:+.2f} at {cell.percent_of_footprint} %"
        print(f"{name:<8}    {100 * mean:+.2f} points in the mean, {worst}")


COMMAND = Command(
    "policies",
    "what each policy of eviction gives on a trace, beside the bound that none exceeds",
    "radixkv policies agent --requests 500",
    add,
    run,
    "lru is the default; hint: lru, told where sessions end (release(cold=True)); hazard: "
    "PrefixCache(policy='hazard'); both. Keeps the trace in memory. " + TRACE_HELP,
)
