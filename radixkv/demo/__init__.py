"""`radixkv demo`: a real model answers several users over one system prompt, with the cache off and on."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radixkv.demo.conversation import converse, shared_prefix
from radixkv.demo.model import find_model, load_model
from radixkv.demo.report import as_json, compare, pages_by_state, print_report, verdict
from radixkv.demo.restart import restart, sentence
from radixkv.errors import InvalidArgument
from radixkv.kv_plan import KvPlan
from radixkv.observe import tree_svg, tree_text

if TYPE_CHECKING:
    from radixkv.hf import Generator

__all__ = ["run"]

_DISK = "2GiB"


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0, or 1 if the cache changed an answer in fp32. Raises errors of RadixKVError."""
    if args.max_new_tokens < 1:
        raise InvalidArgument(f"--max-new-tokens is {args.max_new_tokens}: give at least 1")
    if args.disk and args.svg:
        raise InvalidArgument("--disk shows a restart and draws no tree: leave out --svg")
    say = _Progress(args.json)
    source = find_model(args.model)
    say(f"loading {source.name} in {args.dtype}")
    started = time.perf_counter()
    # Threads that spin while they wait cost a busy machine ten times the work; waking sleeping ones costs microseconds.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():
        _hush_libraries()
    import torch

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype]
    model, tokenizer = load_model(source, dtype, say)

    from radixkv.hf import Generator, engine_for
    from radixkv.tiers import TierOptions

    tiers = TierOptions(disk=args.disk, disk_capacity=_DISK) if args.disk else None
    kv_format = _kv_format(args.kv_format)
    sizes = {"num_pages": args.num_pages, "page_size": args.page_size}
    with engine_for(model, **sizes, kv_format=kv_format, tiers=tiers) as engine:
        say(f"loaded in {time.perf_counter() - started:.1f} s: {engine!r}, {torch.get_num_threads()} threads")
        with Generator(model, engine) as generator:
            say("a small model: its speed and its memory are the point, not its wit")
            if args.disk:
                return _restart(generator, tokenizer, args, say)
            return _compare(generator, tokenizer, args, say)


def _restart(generator: Generator, tokenizer: Any, args: argparse.Namespace, say: _Progress) -> int:
    """The conversations once, over what an earlier start has left in --disk."""
    report = restart(generator, tokenizer, Path(args.disk), args.max_new_tokens, say)
    print(json.dumps(report, indent=2) if args.json else sentence(report, Path(args.disk)))
    return 0


def _compare(generator: Generator, tokenizer: Any, args: argparse.Namespace, say: _Progress) -> int:
    """The conversations twice, with the cache off and on."""
    engine = generator.engine
    say("\ncache off: every request starts with an empty cache")
    off = converse(generator, tokenizer, args.max_new_tokens, say, keep=False)
    engine.cache.clear()
    say("\ncache on: the same conversations, in the same order")
    on = converse(generator, tokenizer, args.max_new_tokens, say, keep=True)
    report = compare(off, on)
    shared = shared_prefix(generator, tokenizer)
    with engine.cache.pin(shared):
        report["pages"] = pages_by_state(engine.cache.stats())
        snapshot = engine.cache.snapshot()
    if args.svg:
        Path(args.svg).write_text(tree_svg(snapshot, tokenizer.decode), encoding="utf-8")
    if args.json:
        print(json.dumps(as_json(report, off, on, args), indent=2))
    else:
        print_report(report, off, on, engine, len(shared))
        print("\nthe tree (the system prompt and the examples are pinned):")
        print(tree_text(snapshot, tokenizer.decode))
        print("\n" + verdict(report, args.dtype))
    return int(args.dtype == "float32" and not report["equal"])


def _kv_format(named: str | None) -> str | KvPlan | None:
    """A format's name, or the plan in a file of this name."""
    return KvPlan.load(named) if named is not None and Path(named).is_file() else named


class _Progress:
    """Prints what happens, to standard error where standard output belongs to JSON."""

    def __init__(self, to_stderr: bool) -> None:
        self._file = sys.stderr if to_stderr else sys.stdout

    def __call__(self, line: str = "") -> None:
        print(line, file=self._file, flush=True)


def _hush_libraries() -> None:
    """No progress bars, no warnings of libraries. Bars read the variables when they are imported, tqdm's by torch."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"(?!radixkv)")
