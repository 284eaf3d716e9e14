"""`radixkv curve`: the exact hit rate at every capacity, from one pass over a trace."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from radixkv.capacity import FORMATS, bytes_per_page, format_bytes, read_model
from radixkv.cli.common import (
    TRACE_HELP,
    Command,
    ProgressLine,
    add_json,
    add_page_size,
    add_trace_options,
    all_requests,
    points,
    print_json,
    printable,
    refuse_shared_output,
    requests_of,
    text_output,
)
from radixkv.errors import InvalidArgument
from radixkv.traces.curve import CapacityCurve, capacity_curve
from radixkv.traces.curve.clairvoyant import clairvoyant_hit_rates
from radixkv.traces.curve.picture import MAX_CURVES, Drawn, Memory, curves_svg
from radixkv.traces.replay import replay
from radixkv.traces.request import TraceRequest
from radixkv.traces.workload import WORKLOADS

__all__ = ["COMMAND"]

_SHARES = (1, 2, 5, 10, 20, 50, 100)
"""The capacities shown, in percent of the distinct pages of the trace."""

_DRAWN = {"clairvoyant": 32, "hints": 12}
"""More capacities at which a line of a picture is computed; a hint's takes a replay each."""


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("traces", metavar="TRACE", nargs="+", help="file, - or " + ", ".join(WORKLOADS))
    add_trace_options(parser)
    add_page_size(parser)
    parser.add_argument("--csv", metavar="FILE", help="write the hit rate at each capacity where it changes (- prints)")
    parser.add_argument("--svg", metavar="FILE", help="draw the curves of all traces in one picture (- prints)")
    parser.add_argument(
        "--points", type=points, metavar="N", help="at most N points in the CSV (default: all) and the JSON (200)"
    )
    parser.add_argument("--model", metavar="MODEL", help="also in memory, of this model's tokens: as `radixkv plan`")
    parser.add_argument("--format", choices=list(FORMATS), default="bf16", help="of its K and V (default: %(default)s)")
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
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Compute the curves; write and print what was asked for."""
    _check(args)
    memory = None if args.model is None else _memory(args)
    found = [_Found(argparse.Namespace(**vars(args), trace=trace), memory) for trace in args.traces]
    if args.csv is not None:
        with text_output(args.csv) as stream:
            found[0].curve.to_csv(stream, args.points)
    if args.svg is not None:
        title = f"{args.traces[0]}: hit rate by capacity" if len(found) == 1 else "Hit rate by capacity"
        with text_output(args.svg) as stream:
            stream.write(curves_svg([each.drawn for each in found], title, memory))
    if args.json:
        objects = [each.to_dict(args.points or 200) for each in found]
        print_json(objects[0] if len(objects) == 1 else {"traces": objects})
    elif "-" not in (args.csv, args.svg):
        for place, each in enumerate(found):
            print(end="\n" * (place > 0))
            _print(each)
    return 0


def _check(args: argparse.Namespace) -> None:
    refuse_shared_output(args.csv, args.svg, "-" if args.json else None)
    if args.csv is not None and len(args.traces) > 1:
        raise InvalidArgument(f"a CSV has one curve, and here are {len(args.traces)} traces: give one, or --json")
    if len(args.traces) > MAX_CURVES:
        raise InvalidArgument(f"{len(args.traces)} traces: at most {MAX_CURVES} fit into one picture or table")
    if args.traces.count("-") > 1:
        raise InvalidArgument("two traces cannot both be standard input: name a file")


def _memory(args: argparse.Namespace) -> Memory:
    model = read_model(args.model)
    page = bytes_per_page(model, FORMATS[args.format], args.page_size)
    return Memory(page / args.page_size, f"{model.name} in {args.format}")


class _Found:
    """A trace's curve, its shares, and what else was asked for."""

    def __init__(self, args: argparse.Namespace, memory: Memory | None) -> None:
        self.trace = args.trace
        kept = all_requests(args) if args.clairvoyant or args.hints else None
        with ProgressLine(total=None if kept is None else len(kept)) as progress:
            requests = requests_of(args, progress) if kept is None else kept
            self.curve = capacity_curve(requests, args.page_size, progress)
        if self.curve.distinct_pages == 0:
            raise InvalidArgument(
                f"no request of {args.trace} fills a page of {args.page_size} tokens: lower --page-size"
            )
        self.shares = _share_rows(self.curve, memory)
        lines = {}
        for name in ("clairvoyant", "hints"):
            if kept is not None and getattr(args, name):
                lines[name] = self._line(name, kept, _DRAWN[name] if args.svg is not None else 0)
        self.drawn = Drawn(str(args.trace), self.curve, **lines)

    def _line(self, name: str, requests: list[TraceRequest], more: int) -> list[tuple[int, float]]:
        """The rates at the shares, which it also adds to them, and at ``more`` capacities between none and all."""
        between = np.geomspace(1, max(2, self.curve.max_pages), more).astype(int).tolist() if more else []
        capacities = sorted({*(row["capacity_pages"] for row in self.shares), *between})
        rates = (_clairvoyant if name == "clairvoyant" else _hints)(requests, self.curve.page_size, capacities)
        at = dict(zip(capacities, rates, strict=True))
        for row in self.shares:
            row[name] = at[row["capacity_pages"]]
        return list(at.items())

    def to_dict(self, points: int) -> dict[str, Any]:
        """As a JSON object."""
        return {"trace": self.trace, **self.curve.to_dict(points), "shares": self.shares}


def _share_rows(curve: CapacityCurve, memory: Memory | None) -> list[dict[str, Any]]:
    """The hit rate at a few shares of the footprint."""
    rows = []
    for share in _SHARES:
        pages = curve.distinct_pages * share // 100
        row = {"percent_of_footprint": share, "capacity_pages": pages, "hit_rate": curve.hit_rate(pages)}
        if memory is not None:
            row["bytes"] = round(pages * curve.page_size * memory.bytes_per_token)
        rows.append(row)
    return rows


def _clairvoyant(requests: list[TraceRequest], page_size: int, capacities: list[int]) -> list[float]:
    with ProgressLine("requests", len(requests) * (1 + len(capacities))) as progress:
        return clairvoyant_hit_rates(requests, page_size, capacities, progress)


def _hints(requests: list[TraceRequest], page_size: int, capacities: list[int]) -> list[float]:
    rates = []
    with ProgressLine("requests", len(requests) * len(capacities)) as progress:
        for place, pages in enumerate(capacities):

            def tell(done: int, before: int = place * len(requests)) -> None:
                progress(before + done)

            rates.append(replay(requests, max(1, pages) * page_size, page_size, True, tell, hints=True).hit_rate)
    return rates


def _print(found: _Found) -> None:
    curve, shares = found.curve, found.shares
    page = curve.page_size
    print(f"trace       {printable(found.trace)}: {curve.requests:,} requests, {curve.input_tokens:,} input tokens")
    print(f"footprint   {curve.distinct_pages:,} pages of {page} tokens ({curve.distinct_pages * page:,} tokens)")
    print(f"best        {100 * curve.hit_rate(curve.max_pages):.2f} % from {curve.max_pages:,} pages on")
    more = [name for name in ("hints", "clairvoyant") if name in shares[0]]
    heads = f"  {'memory':>10}" * ("bytes" in shares[0])
    heads += f"  {'hit rate':>8}" + "".join(f"  {name:>11}" for name in more)
    print(f"\n{'footprint':>9}  {'pages':>10}  {'tokens':>13}{heads}")
    for row in shares:
        pages = row["capacity_pages"]
        line = f"{row['percent_of_footprint']:>7} %  {pages:>10,}  {pages * page:>13,}"
        line += f"  {format_bytes(row['bytes']):>10}" if "bytes" in row else ""
        line += f"  {100 * row['hit_rate']:>6.2f} %" + "".join(f"  {100 * row[name]:>9.2f} %" for name in more)
        print(line)


COMMAND = Command(
    "curve",
    "the exact hit rate at every capacity, from one pass over a trace",
    "radixkv curve agent --model llama-3-8b --svg curve.svg",
    add,
    run,
    "Equals `replay --page-aligned` at each capacity. Several traces are drawn in one picture. " + TRACE_HELP,
)
