"""The tokens: one system prompt, eight requests after it."""

from __future__ import annotations

from typing import Any

from radixkv.demo.scenario import SYSTEM, USERS

SYSTEM_TOKENS = 1000
REQUEST_TOKENS = 50
REQUESTS = 8


def tokens(tokenizer: Any, requests: int) -> tuple[list[int], list[list[int]]]:
    """The system prompt of the demo at exactly SYSTEM_TOKENS, and prompts that share it and not a token more."""

    def exactly(text: str, count: int) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return (ids * (count // len(ids) + 1))[:count]

    system = exactly(SYSTEM, SYSTEM_TOKENS)
    questions = [f"{user.name} asks: {question}" for user in USERS for question in user.questions]
    openings = ("First", "Now", "Next", "Then", "Also", "Finally", "So", "Well")[:requests]
    prompts = [
        system + exactly(f"{opening}, {questions[i % len(questions)]} Answer in one sentence.\n", REQUEST_TOKENS)
        for i, opening in enumerate(openings)
    ]
    if len({prompt[SYSTEM_TOKENS] for prompt in prompts}) != len(prompts):
        raise ValueError("two requests share more than the system prompt: give them other openings")
    return system, prompts
