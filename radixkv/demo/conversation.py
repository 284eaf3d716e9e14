"""The conversations: every user asks in turn, and a turn keeps what it cost and the logits of its answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from radixkv.demo import scenario

if TYPE_CHECKING:
    import torch

    from radixkv.hf import Generator

__all__ = ["Conversation", "Turn", "converse", "shared_prefix"]


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
    restored_tokens: int = 0


@dataclass
class Conversation:
    """All turns of all users in order, with the cache off or on."""

    turns: list[Turn]
    seconds: float

    def total(self, figure: str) -> int:
        return sum(getattr(turn, figure) for turn in self.turns)


def converse(
    generator: Generator, tokenizer: Any, max_new_tokens: int, say: Callable[[str], None], *, keep: bool
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
            turn = _ask(generator, tokenizer, history, user.name, max_new_tokens)
            history.append({"role": "assistant", "content": turn.answer})
            turns.append(turn)
            restored = f"{turn.restored_tokens} restored, " if turn.restored_tokens else ""
            say(
                f"  {turn.user}: {turn.question}  ->  {turn.answer}\n"
                f"       {turn.cached_tokens} of {turn.prompt_tokens} prompt tokens cached, {restored}"
                f"first token after {turn.time_to_first_token:.2f} s"
            )
    return Conversation(turns, time.perf_counter() - started)


def shared_prefix(generator: Generator, tokenizer: Any) -> list[int]:
    """The tokens with which every conversation starts, as far as they are cached."""
    first, second = (_encode(tokenizer, [*_opening(), {"role": "user", "content": text}]) for text in ("?", "Hello"))
    pairs = zip(first, second, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
    return first[: generator.engine.cache.match(first[:same])]


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
        restored_tokens=sum(stats.restored_tokens.values()),
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
