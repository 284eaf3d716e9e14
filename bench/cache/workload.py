"""The work that every driver does: tokens of the prompts, and the requests of the replay. Needs numpy only.

1,000 conversations of 8 turns share a system prompt of 512 tokens. Beside them there are longer conversations, also of
8 turns after the same system prompt, one for each of LENGTHS: these are looked up. All ids are drawn from a seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]

PAGE, SYSTEM, TURNS, TURN = 16, 512, 8, 128
LENGTHS = (1024, 8192, 32768)  # prompts that are looked up
COMMIT_UNDER = (SYSTEM, 8192, 32768)  # prompts under which a suffix is committed
SUFFIX = 1024
LEAF_PAGES = 4  # pages of a leaf in the tree that is evicted
EVICT_PAGES = 64  # pages a call
REPLAY_TOKENS = 3_000_000
HASH_BLOCK = 512  # tokens for each hash id of the trace
VOCABULARY = 32_000


def system_prompt() -> Tokens:
    return np.random.default_rng(0).integers(0, VOCABULARY, SYSTEM, dtype=np.int32)


def conversations(count: int) -> Iterator[Tokens]:
    """The prompts of `count` conversations, their turns interleaved."""
    system = system_prompt()
    turns = np.random.default_rng(1).integers(0, VOCABULARY, (count, TURNS * TURN), dtype=np.int32)
    for turn in range(1, TURNS + 1):
        for conversation in turns:
            yield np.concatenate([system, conversation[: turn * TURN]])


def long_prompt(length: int) -> Tokens:
    """A prompt of `length` tokens and one more, which is left to compute, so that `length` tokens can be cached."""
    rest = np.random.default_rng(length).integers(0, VOCABULARY, length + 1 - SYSTEM, dtype=np.int32)
    return np.concatenate([system_prompt(), rest])


def long_turns(length: int) -> Iterator[Tokens]:
    """The prompts of its 8 turns, each a whole number of pages and one token."""
    prompt = long_prompt(length)
    for turn in range(1, TURNS + 1):
        yield prompt[: SYSTEM + (length - SYSTEM) * turn // TURNS // PAGE * PAGE + 1]


def suffixes(count: int) -> npt.NDArray[np.int32]:
    return np.random.default_rng(2).integers(0, VOCABULARY, (count, SUFFIX), dtype=np.int32)


def leaves(count: int) -> Iterator[Tokens]:
    """`count` prompts of LEAF_PAGES pages that share nothing."""
    tokens = np.arange(LEAF_PAGES * PAGE, dtype=np.int32)
    for i in range(count):
        tokens[0], tokens[1] = i % VOCABULARY, i // VOCABULARY
        yield tokens.copy()


def mooncake(path: Path, limit: int | None = None) -> Iterator[Tokens]:
    """The inputs of the trace in order: HASH_BLOCK equal tokens for each hash id, cut to the length of the input."""
    with path.open() as lines:
        for number, line in enumerate(lines):
            if number == limit:
                return
            request = json.loads(line)
            ids = np.array(request["hash_ids"], dtype=np.int32)
            yield np.repeat(ids, HASH_BLOCK)[: request["input_length"]]
