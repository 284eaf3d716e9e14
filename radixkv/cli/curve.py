"""`radixkv curve`: the exact hit rate at every capacity, from one pass over a trace."""

from __future__ import annotations

import argparse
from typing import Any

from radixkv.cli.common import (
    TRACE_HELP,
    Command,
    ProgressLine,
    add_page_size,
    add_trace,
    points,
    print_json,
    printable,
    requests_of,
    text_output,
)
from radixkv.errors import InvalidArgument
from radixkv.traces.curve import CapacityCurve, capacity_curve
from radixkv.traces.curve.clairvoyant import clairvoyant_hit_rates
from radixkv.traces.replay import replay
from radixkv.traces.request import TraceRequest

__all__ = ["COMMAND"]

_SHARES = (1, 2, 5, 10, 20, 50, 100)
"""The capacities shown, in percent of the distinct pages of the trace."""


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    add_trace(parser)
    add_page_size(parser)
    parser.add_argument("--csv", metavar="FILE", help="write the hit rate at each capacity where it changes (- prints)")
    parser.add_argument("--svg", metavar="FILE", help="draw the curve (- prints)")
    parser.add_argument(
        "--points", type=points, metavar="N", help="at most N points in the CSV (default: all) and the JSON (200)"
    )
    parser.add_argument(
        "--clairvoyant",
        action="store_true",
        help="also what no policy can exceed (Belady's rule); keeps the trace in memory",
    )
    parser.add_argument(
        "--hints",
        action="store_true",
        help="also what LRU gives that is told where sessions end, by replay at each share; keeps the trace in memory",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Compute the curve; write and print what was asked for."""
    outputs = [name for name in (args.csv, args.svg, "-" if args.json else None) if name is not None]
    if len(set(outputs)) < len(outputs):
        raise InvalidArgument("two outputs cannot share standard output or a file: give --csv or --svg another name")
    kept = list(requests_of(args)) if args.clairvoyant or args.hints else None
    with ProgressLine() as progress:
        curve = capacity_curve(requests_of(args) if kept is None else kept, args.page_size, progress)
    if curve.distinct_pages == 0:
        raise InvalidArgument(f"no request of {args.trace} fills a page of {args.page_size} tokens: lower --page-size")
    shares = _share_rows(curve)
    if args.clairvoyant and kept is not None:
        _add_clairvoyant(shares, kept, curve.page_size)
    if args.hints and kept is not None:
        _add_hints(shares, kept, curve.page_size)
    if args.csv is not None:
        with text_output(args.csv) as stream:
            curve.to_csv(stream, args.points)
    if args.svg is not None:
        with text_output(args.svg) as stream:
            marks = {
                name: [(row["capacity_pages"], row[name]) for row in shares]
                for name in ("clairvoyant", "hints")
                if name in shares[0]
            }
            curve.to_svg(stream, f"{args.trace}: hit rate by capacity", **marks)
    if args.json:
        print_json({"trace": args.trace, **curve.to_dict(args.points or 200), "shares": shares})
    elif "-" not in (args.csv, args.svg):
        _print(args.trace, curve, shares)
    return 0


def _share_rows(curve: CapacityCurve) -> list[dict[str, Any]]:
    """The hit rate at a few shares of the footprint."""
    capacities = [curve.distinct_pages * share // 100 for share in _SHARES]
    return [
        {"percent_of_footprint": share, "capacity_pages": pages, "hit_rate": curve.hit_rate(pages)}
        for share, pages in zip(_SHARES, capacities, strict=True)
    ]


def _add_clairvoyant(rows: list[dict[str, Any]], requests: list[TraceRequest], page_size: int) -> None:
    bounds = clairvoyant_hit_rates(requests, page_size, [row["capacity_pages"] for row in rows])
    for row, bound in zip(rows, bounds, strict=True):
        row["clairvoyant"] = bound


def _add_hints(rows: list[dict[str, Any]], requests: list[TraceRequest], page_size: int) -> None:
    with ProgressLine() as progress:
        for row in rows:
            tokens = max(1, row["capacity_pages"]) * page_size
            row["hints"] = replay(requests, tokens, page_size, True, progress, hints=True).hit_rate


def _print(trace: str, curve: CapacityCurve, shares: list[dict[str, Any]]) -> None:
    page = curve.page_size
    print(f"trace       {printable(trace)}: {curve.requests:,} requests, {curve.input_tokens:,} input tokens")
    print(f"footprint   {curve.distinct_pages:,} pages of {page} tokens ({curve.distinct_pages * page:,} tokens)")
    print(f"best        {100 * curve.hit_rate(curve.max_pages):.2f} % from {curve.max_pages:,} pages on")
    more = [name for name in ("hints", "clairvoyant") if name in shares[0]]
    heads = "".join(f"  {name:>11}" for name in more)
    print(f"\n{'footprint':>9}  {'pages':>10}  {'tokens':>13}  {'hit rate':>8}{heads}")
    for row in shares:
        pages = row["capacity_pages"]
        line = f"{row['percent_of_footprint']:>7} %  {pages:>10,}  {pages * page:>13,}  {100 * row['hit_rate']:>6.2f} %"
        print(line + "".join(f"  {100 * row[name]:>9.2f} %" for name in more))


COMMAND = Command(
    "curve",
    "the exact hit rate at every capacity, from one pass over a trace",
    "radixkv curve agent --svg curve.svg",
    add,
    run,
    "Equals `replay --page-aligned` at each capacity. " + TRACE_HELP,
)
