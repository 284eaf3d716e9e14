"""`radixkv plan`: how much memory a model's KV cache takes, and what fits."""

from __future__ import annotations

import argparse
from typing import Any

from radixkv.capacity import (
    FORMATS,
    Fit,
    Model,
    bytes_per_page,
    bytes_per_request,
    bytes_per_token,
    expanded,
    fit,
    fits_latent,
    format_bytes,
    known_models,
    need_for,
    paging_waste,
    preallocation_waste,
    read_model,
)
from radixkv.capacity.picture import formats_svg
from radixkv.cli.common import (
    TRACE_HELP,
    Command,
    ProgressLine,
    add_page_size,
    add_trace_options,
    count,
    print_json,
    printable,
    requests_of,
    text_output,
)
from radixkv.errors import InvalidArgument
from radixkv.formats import LayerFormat
from radixkv.memory import parse_bytes

__all__ = ["COMMAND"]

_SHOWN = {name: f for name, f in FORMATS.items() if name not in ("fp16", "fp8_rotated")}


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a config.json, a folder with one, a GGUF file, or one of " + ", ".join(known_models()),
    )
    parser.add_argument("--memory", type=amount, metavar="BYTES", help="of the device, as 80GiB: says what fits")
    parser.add_argument(
        "--weights",
        type=lambda text: None if text == "auto" else amount(text),
        metavar="BYTES",
        help="of the model, as 16GiB; auto (default): what lies beside its configuration, or is published",
    )
    parser.add_argument(
        "--reserve",
        type=share,
        default=0.1,
        metavar="R",
        help="share of the rest that is kept back (default: %(default)s)",
    )
    parser.add_argument(
        "--length", type=count, default=2048, metavar="N", help="tokens of a request (default: %(default)s)"
    )
    parser.add_argument(
        "--max-length",
        type=count,
        metavar="N",
        help="tokens that a contiguous cache would set aside (default: the model's)",
    )
    parser.add_argument("--format", choices=list(FORMATS), default="bf16", help="of K and V (default: %(default)s)")
    add_page_size(parser)
    parser.add_argument("--trace", metavar="TRACE", help="traffic, to size the cache for --target")
    parser.add_argument("--target", type=share, metavar="R", help="hit rate to reach on TRACE, as 0.9")
    add_trace_options(parser)
    parser.add_argument("--svg", metavar="FILE", help="draw the formats side by side (- prints)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def amount(text: str) -> int:
    """An amount of memory, as 80GiB."""
    try:
        return parse_bytes(text)
    except InvalidArgument as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def share(text: str) -> float:
    """A share from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no share from 0 to 1, such as 0.9")
    return value


def run(args: argparse.Namespace) -> int:
    """Compute what was asked for; print it."""
    if (args.trace is None) != (args.target is None):
        raise InvalidArgument("--trace and --target go together: the traffic, and the hit rate to reach on it")
    if args.json and args.svg == "-":
        raise InvalidArgument("two outputs cannot share standard output: give --svg a file")
    model = read_model(args.model)
    found = _describe(model, args)
    if args.trace is not None:
        found["trace"] = _for_target(model, args)
    if args.svg is not None:
        needs = found["trace"]["bytes_by_format"] if args.trace is not None else {}
        rows = [
            (row["format"], row["bytes_per_token"], row.get("requests"), needs.get(row["format"]))
            for row in found["formats"]
        ]
        what = f"{args.length:,} tokens a request" + (f", {format_bytes(args.memory)}" if args.memory else "")
        what += f"; needs: for a hit rate of {100 * args.target:g} % on {args.trace}" if args.trace is not None else ""
        with text_output(args.svg) as stream:
            stream.write(formats_svg(f"{model.name}: KV cache by format", what, rows))
    if args.json:
        print_json(found)
    elif args.svg != "-":
        _print(model, found)
    return 0


def _describe(model: Model, args: argparse.Namespace) -> dict[str, Any]:
    """All but the trace, as one JSON object."""
    reserved: int = args.max_length or model.max_length or 0
    chosen = FORMATS[args.format]
    if not fits_latent(model, chosen):
        raise InvalidArgument(
            f"{model.name} has latent layers, which are not stored as {args.format}: use --format fp32, bf16, fp16 or "
            "fp8"
        )
    whole = expanded(model)
    weights = _weights(model, args) if args.memory else None
    row = _row(model, chosen, weights, args)
    if weights is not None and row["pages"] == 0:
        raise InvalidArgument(
            f"{format_bytes(args.memory)} less {format_bytes(weights)} of weights and a reserve of "
            f"{100 * args.reserve:g} % hold no page of {format_bytes(row['bytes_per_page'])}: raise --memory, "
            "or give --weights as a part of them where the model is divided over devices"
        )
    return {
        "model": model.name,
        "layers": [
            {"layers": n, "kind": layer.kind, "num_kv_heads": layer.num_kv_heads, "k_dim": layer.k_dim,
             "v_dim": layer.v_dim, "window": layer.window} for layer, n in model.groups()
        ],
        "state_layers": model.num_state_layers,
        "sharing_layers": model.num_sharing_layers,
        "page_size": args.page_size,
        "length": args.length,
        "request_bytes_in_windows": bytes_per_request(model, chosen, args.length, keep_windows_only=True),
        "reserved_length": reserved or None,
        "preallocation_waste": preallocation_waste(args.length, reserved) if reserved >= args.length else None,
        "paging_waste": paging_waste(args.length, args.page_size),
        "memory_bytes": args.memory,
        "weight_bytes": weights,
        "reserve": args.reserve,
        "chosen": row,
        "bytes_per_token_expanded": bytes_per_token(whole, chosen) if whole else None,
        "formats": [_row(model, f, weights, args) for f in _SHOWN.values() if fits_latent(model, f)],
    }  # fmt: skip


def _row(model: Model, kv_format: LayerFormat, weights: int | None, args: argparse.Namespace) -> dict[str, Any]:
    token = bytes_per_token(model, kv_format)
    row: dict[str, Any] = {
        "format": kv_format.name,
        "bytes_per_token": token,
        "bytes_per_page": bytes_per_page(model, kv_format, args.page_size),
        "bytes_per_request": bytes_per_request(model, kv_format, args.length),
        "times_smaller": round(bytes_per_token(model, FORMATS["bf16"]) / token, 2),
    }
    if weights is not None:
        room = fit(model, kv_format, args.memory, weights, args.reserve, args.page_size)
        row |= _fits(room, args.length)
    return row


def _fits(room: Fit, length: int) -> dict[str, int]:
    return {
        "bytes_for_pages": room.num_bytes,
        "pages": room.num_pages,
        "tokens": room.num_tokens,
        "requests": room.requests_of(length),
    }


def _weights(model: Model, args: argparse.Namespace) -> int:
    found: int | None = args.weights if args.weights is not None else model.weight_bytes
    if found is None:
        raise InvalidArgument(f"no weights lie beside the configuration of {model.name}: give --weights, as 16GiB")
    return found


def _for_target(model: Model, args: argparse.Namespace) -> dict[str, Any]:
    """The memory that reaches the target on the trace, in each format."""
    from radixkv.traces.curve import capacity_curve

    with ProgressLine() as progress:
        curve = capacity_curve(requests_of(args, progress), args.page_size, progress)
    pages = {name: bytes_per_page(model, f, args.page_size) for name, f in _SHOWN.items() if fits_latent(model, f)}
    need = need_for(curve, args.target, bytes_per_page(model, FORMATS[args.format], args.page_size))
    return {
        "trace": args.trace,
        "target": args.target,
        "hit_rate": need.hit_rate,
        "best_hit_rate": curve.hit_rate(curve.max_pages),
        "pages": need.num_pages,
        "tokens": need.num_tokens,
        "bytes": need.num_bytes,
        "bytes_by_format": {name: need.num_pages * size for name, size in pages.items()},
    }


def _print(model: Model, found: dict[str, Any]) -> None:
    chosen = found["chosen"]
    print(f"model       {printable(model.name)}: " + "; ".join(f"{n} layers {layer}" for layer, n in model.groups()))
    if found["sharing_layers"]:
        print(f"            {found['sharing_layers']} layers read the K and V of others")
    if found["state_layers"]:
        print(f"            {found['state_layers']} layers keep no K and V; their states are not counted")
    print(f"in {chosen['format']}")
    print(f"a token     {chosen['bytes_per_token']:,} B = {format_bytes(chosen['bytes_per_token'])}")
    if found["bytes_per_token_expanded"]:
        print(f"            {found['bytes_per_token_expanded']:,} B where K and V of every head are stored instead")
    print(f"a page      {format_bytes(chosen['bytes_per_page'])} of {found['page_size']} tokens")
    print(f"a request   {format_bytes(chosen['bytes_per_request'])} of {found['length']:,} tokens", end="")
    windows = found["request_bytes_in_windows"]
    print(f"; {format_bytes(windows)} where windows alone are kept" if windows < chosen["bytes_per_request"] else "")
    waste = f"{100 * found['paging_waste']:.1f} % of its pages"
    if found["preallocation_waste"] is not None:
        reserved = f"a contiguous cache for {found['reserved_length']:,} tokens"
        waste += f"; {100 * found['preallocation_waste']:.1f} % of {reserved}"
    print(f"wastes      {waste}")
    if found["memory_bytes"]:
        _print_fit(found)
    _print_formats(found)
    if "trace" in found:
        _print_target(found["trace"], chosen["format"])


def _print_fit(found: dict[str, Any]) -> None:
    chosen = found["chosen"]
    print(
        f"memory      {format_bytes(found['memory_bytes'])} - {format_bytes(found['weight_bytes'])} of weights, "
        f"{100 * found['reserve']:g} % kept back: {format_bytes(chosen['bytes_for_pages'])} for pages"
    )
    print(
        f"fits        {chosen['pages']:,} pages, {chosen['tokens']:,} tokens, "
        f"{chosen['requests']:,} requests of {found['length']:,} tokens that share nothing"
    )


def _print_formats(found: dict[str, Any]) -> None:
    fits = bool(found["memory_bytes"])
    print(
        f"\n{'format':<8}{'a token':>12}{'a page':>12}{'against bf16':>14}" + f"{'tokens':>14}{'requests':>10}" * fits
    )
    for row in found["formats"]:
        token, page = format_bytes(row["bytes_per_token"]), format_bytes(row["bytes_per_page"])
        line = f"{row['format']:<8}{token:>12}{page:>12}{row['times_smaller']:>12.2f} x"
        print(line + (f"{row['tokens']:>14,}{row['requests']:>10,}" if fits else ""))


def _print_target(need: dict[str, Any], chosen: str) -> None:
    print(f"\ntrace       {printable(need['trace'])}: {100 * need['best_hit_rate']:.2f} % at best")
    print(f"reaches     {100 * need['hit_rate']:.2f} % from {need['pages']:,} pages on, {need['tokens']:,} tokens")
    print(f"needs       {format_bytes(need['bytes'])} in {chosen}; ", end="")
    others = need["bytes_by_format"].items()
    print(", ".join(f"{format_bytes(size)} in {name}" for name, size in others if name != chosen))


COMMAND = Command(
    "plan",
    "how much memory a model's KV cache takes, and what fits",
    "radixkv plan llama-3-8b --memory 80GiB --length 2048",
    add,
    run,
    "With --trace and --target: the memory that reaches a hit rate on your traffic. " + TRACE_HELP,
)
