"""What a type checker says of calls that are wrong, and of those that are right."""

from __future__ import annotations

import pytest

api = pytest.importorskip("mypy.api")

RIGHT = """
import array
import numpy as np
import radixkv
cache = radixkv.PrefixCache(4)
for tokens in ([1], (1, 2), range(3), np.zeros(3, np.int32), np.zeros(3, np.int64), array.array("i", [1])):
    cache.match(tokens)
cache.acquire([1]).extend([2])
assert cache.would_fit([1]).needed == 1

from radixkv.scheduling import Request
Request([1], stop_tokens=[2]).prompt.astype(np.int64), Request(range(3), 5, namespace="a")
"""

RIGHT_OF_TORCH = """
import array
import numpy as np
import torch
from radixkv.hf import AsyncGenerator, Generator
def call(generator: Generator, other: AsyncGenerator) -> None:
    for tokens in ([1], (1, 2), range(3), np.zeros(3, np.int32), torch.zeros(3), array.array("i", [1])):
        request = generator.submit(tokens, stop_tokens=[3])
        other.stream(tokens)
    request.prompt.astype(np.int64), request.tokens.copy()
"""


def errors(code: str) -> str:
    out, err, _ = api.run(
        ["--config-file=", "--strict", "--follow-imports=silent", "--ignore-missing-imports", "-c", code]
    )
    return str(out + err)


def test_tokens_that_are_right():
    assert errors(RIGHT).startswith("Success")


def test_tokens_that_a_generator_takes():
    pytest.importorskip("transformers")
    assert errors(RIGHT_OF_TORCH).startswith("Success")
    wrong = RIGHT_OF_TORCH.replace("(tokens", "('tokens'")
    assert errors(wrong).count("[arg-type]") == 2


def test_a_str_is_no_tokens():
    found = errors("import radixkv; radixkv.PrefixCache(4).match('abc'); radixkv.PrefixCache(4).acquire({1: 2})")
    assert found.count("[arg-type]") == 2
