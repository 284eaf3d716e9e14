"""`radixkv kv-check`: which formats of K and V a model takes, measured on a text."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radixkv.cli.common import Command, ProgressLine, count, print_json, say, text_output
from radixkv.errors import BackendUnavailable, InvalidArgument

if TYPE_CHECKING:
    from radixkv.hf.kv_check import KvCheck

__all__ = ["COMMAND"]


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("model", metavar="MODEL", help="a folder of transformers or a GGUF file")
    parser.add_argument("--text", required=True, metavar="FILE", help="what the model shall read: of your own traffic")
    parser.add_argument("--max-kl", type=float, default=0.001, metavar="X", help="nats a token (default: %(default)s)")
    parser.add_argument(
        "--formats", default="int8,k8v4,int4", metavar="A,B", help="to try beside 16 bits (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=count, default=1024, metavar="N", help="of the text, from its start (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the plan: Engine(kv_format=KvPlan.load(FILE))")
    parser.add_argument("--svg", metavar="FILE", help="draw KL against bytes a token (- prints)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure; print what came out, and write the plan."""
    if args.json and args.svg == "-":
        raise InvalidArgument("two outputs cannot share standard output: give --svg a file")
    try:
        found = _check(args)
    except ModuleNotFoundError as error:
        raise BackendUnavailable(f"kv-check needs the package {error.name}: pip install 'radixkv[hf]'") from error
    if args.output:
        found.plan.save(args.output)
    if args.svg:
        from radixkv.observe.loss_svg import loss_svg

        points = [(_summary(t.formats), t.token_bytes, t.loss.kl_mean, t == found.chosen) for t in found.tried]
        with text_output(args.svg) as stream:
            stream.write(loss_svg(f"{Path(args.model).name}: what formats of K and V lose", points, args.max_kl))
    if args.json:
        print_json(_as_json(found))
    elif args.svg != "-":
        _print(found, args)
    return 0


def _check(args: argparse.Namespace) -> KvCheck:
    import torch

    from radixkv.demo.model import find_model, load_model
    from radixkv.hf.kv_check import kv_check

    text = Path(args.text).read_text(encoding="utf-8")
    model, tokenizer = load_model(find_model(args.model), getattr(torch, args.dtype), say)
    tokens = tokenizer(text)["input_ids"][: args.tokens]
    with ProgressLine("passes") as progress:
        return kv_check(model, tokens, args.max_kl, args.formats.split(","), lambda done, _: progress(done))


def _summary(formats: tuple[str, ...]) -> str:
    """ "int8", or "26 x int8, 4 x bf16"."""
    names = dict.fromkeys(formats)
    return formats[0] if len(names) == 1 else ", ".join(f"{formats.count(name)} x {name}" for name in names)


def _as_json(found: KvCheck) -> dict[str, Any]:
    tried = [{"formats": t.formats, "bytes_per_token": t.token_bytes, **asdict(t.loss)} for t in found.tried]
    return {
        "chosen": tried[found.tried.index(found.chosen)],
        "bytes_per_token_own": found.own_token_bytes,
        "text_tokens": found.plan.measured["text_tokens"],
        "tried": tried,
        "keys": [asdict(profile) for profile in found.profiles],
    }


def _print(found: KvCheck, args: argparse.Namespace) -> None:
    loss, tokens = found.chosen.loss, found.plan.measured["text_tokens"]
    print(f"text        {tokens:,} tokens; keys' centres from the first half, losses on the other {loss.tokens:,}")
    print(f"{'plan':<32}{'B/token':>9}{'KL mean':>11}{'KL p99':>10}{'top-1':>9}{'greedy':>9}{'perplexity':>12}")
    for t in found.tried:
        line = f"{_summary(t.formats)[:31]:<32}{t.token_bytes:>9,}{t.loss.kl_mean:>11.6f}{t.loss.kl_p99:>10.4f}"
        line += f"{100 * t.loss.top1:>8.2f}%{100 * t.loss.greedy_prefix:>8.1f}%{100 * t.loss.perplexity:>+11.3f}%"
        print(line + (" *" if t == found.chosen else ""))
    times = found.own_token_bytes / found.chosen.token_bytes
    print(f"chosen      {_summary(found.chosen.formats)}: KL {loss.kl_mean:.6f} of {args.max_kl:g} allowed")
    print(f"memory      {found.chosen.token_bytes:,} B a token, {times:.2f} x less than {args.dtype}")
    _print_keys(found)
    if args.output:
        print(f"wrote       {args.output}: Engine(kv_format=KvPlan.load({args.output!r}))")


def _print_keys(found: KvCheck) -> None:
    """The layers whose keys are hard to store in few bits, and what was made of them."""
    worst = sorted(range(len(found.profiles)), key=lambda i: -found.profiles[i].constant_share)[:3]
    shares = [f"{i}: {100 * found.profiles[i].constant_share:.0f} % ({found.chosen.formats[i]})" for i in worst]
    print("keys        the largest shares of a constant vector, by layer: " + ", ".join(shares))
    if found.profiles[worst[0]].constant_share > 0.98:
        print("            above 98 %: 4 bits lose the rest of a key, and so do 8 where the constant turns with RoPE")


COMMAND = Command(
    "kv-check",
    "which formats of K and V a model takes, measured on your text",
    "radixkv kv-check ./model --text chats.txt --max-kl 0.001 -o plan.json",
    add,
    run,
    "Measures every layer alone in every format, then whole plans, until the cheapest is found whose mean KL from the "
    "model with K and V in its own dtype is within the bound. It holds for the text; it is a bound on nothing else.",
)
