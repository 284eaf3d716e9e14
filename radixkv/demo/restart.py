"""`radixkv demo --disk`: what a start answers its first request with depends on whether there was one before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radixkv.demo.conversation import converse

if TYPE_CHECKING:
    from radixkv.demo.conversation import Turn
    from radixkv.engine import Engine
    from radixkv.hf import Generator

__all__ = ["restart", "sentence"]


def restart(
    generator: Generator, tokenizer: Any, disk: Path, max_new_tokens: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Hold the conversations over the tiers of the generator's engine; what came of the first request.

    The first start with a directory leaves a note of its time there, which later ones compare theirs with.
    """
    engine = generator.engine
    say("\nthe conversations, over what earlier starts left on the disk")
    turns = converse(generator, tokenizer, max_new_tokens, say, keep=True).turns
    note = disk / f"demo-{_fingerprint(engine)}.json"
    cold = json.loads(note.read_text())["time_to_first_token"] if note.exists() else None
    if cold is None and not turns[0].restored_tokens:
        note.write_text(json.dumps({"time_to_first_token": turns[0].time_to_first_token}) + "\n")
    return {"first_request": _figures(turns[0]), "computed_all": cold}


def sentence(report: dict[str, Any], disk: Path) -> str:
    """What came of it, for a person."""
    first = report["first_request"]
    text = (
        f"\nfirst request of this start: {first['prompt_tokens']} tokens, {first['restored_tokens']} of them restored "
        f"from {disk}, {first['computed_tokens']} computed; first token after {first['time_to_first_token']:.2f} s"
    )
    if report["computed_all"] is None:
        return f"{text}\nstart it again: the system prompt is restored then"
    return f"{text} ({report['computed_all']:.2f} s when all was computed)"


def _figures(turn: Turn) -> dict[str, Any]:
    names = ("prompt_tokens", "restored_tokens", "computed_tokens", "time_to_first_token", "answer")
    return {name: getattr(turn, name) for name in names}


def _fingerprint(engine: Engine) -> str:
    assert engine.tiers is not None
    return engine.tiers.fingerprint.hex()
