"""What the two conversations come to: equal or not, as a table, a sentence and one JSON object."""

from __future__ import annotations

import argparse
import statistics
from typing import TYPE_CHECKING, Any

from radixkv.cache import Stats
from radixkv.demo.conversation import Conversation

if TYPE_CHECKING:
    from radixkv.engine import Engine

__all__ = ["as_json", "compare", "pages_by_state", "print_report", "verdict"]


def compare(off: Conversation, on: Conversation) -> dict[str, Any]:
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


def pages_by_state(stats: Stats) -> dict[str, int]:
    """Pages by state."""
    return {state: getattr(stats, state) for state in ("free", "private", "protected", "evictable")}


def print_report(report: dict[str, Any], off: Conversation, on: Conversation, engine: Engine, shared: int) -> None:
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


def verdict(report: dict[str, Any], dtype: str) -> str:
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


def as_json(report: dict[str, Any], off: Conversation, on: Conversation, args: argparse.Namespace) -> dict[str, Any]:
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
