"""Draws the pictures of README and docs: python docs/pictures.py (or `make pictures`)."""

from pathlib import Path

import radixkv
from radixkv.observe import tree_svg

HERE = Path(__file__).parent
SYSTEM = "You are a helpful assistant of the city library. "
TURNS = [
    [SYSTEM + "User: When do you open? ", "Bot: At nine. ", "User: And on Sunday? ", "Bot: We are closed. "],
    [SYSTEM + "User: When do you open? ", "Bot: At nine. ", "User: Thank you! "],
    [SYSTEM + "User: Where can I print? ", "Bot: On the first floor. "],
]


def tree() -> str:
    """A tree of three conversations, a token a letter: one is running, the system prompt is pinned."""
    cache = radixkv.PrefixCache(num_pages=64, page_size=8)
    for conversation in TURNS:
        for end in range(1, len(conversation) + 1):
            with cache.acquire([ord(c) for c in "".join(conversation[:end])]) as lease:
                lease.advance()
    cache.pin([ord(c) for c in SYSTEM])
    running = cache.acquire([ord(c) for c in "".join(TURNS[0]) + "User: Pity. "])
    picture = tree_svg(cache.snapshot(), decode=lambda tokens: "".join(map(chr, tokens)))
    running.release()
    return picture


if __name__ == "__main__":
    (HERE / "tree.svg").write_text(tree())
