"""The tiers below an engine's own pool: K and V of real attention come back with the same bits."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import radixkv  # noqa: E402 (after the skip)
from radixkv.formats import fp8  # noqa: E402
from radixkv.tiers import TierOptions, Tiers  # noqa: E402
from tests.engine.test_engine import forward, make_engine, random_tokens  # noqa: E402
from tests.tiers.pool import IDENTITY  # noqa: E402


def serve(engine: radixkv.Engine, tiers: Tiers, tokens: list[int]) -> tuple[torch.Tensor, int]:
    """The last row of a prompt, and how many of its tokens came from the tiers."""
    fetch = tiers.fetch(tokens)
    tiers.pump()
    fetch.wait(5)
    with engine.acquire(tokens) as lease:
        gained = tiers.fill(lease, fetch)
        with engine.step([lease]) as step:
            out = forward(step)[-1].clone()
    return out, gained


@pytest.mark.parametrize("kv_format", [None, fp8(0.1, 0.3)], ids=["plain", "fp8"])
def test_a_restart_answers_with_the_same_bits(tmp_path, kv_format):
    tokens = random_tokens(np.random.default_rng(0), 50)
    options = TierOptions(disk=tmp_path, disk_capacity="4MiB", threads=0)
    answers = []
    for expected in (0, 48):
        engine = make_engine(kv_format=kv_format)
        with Tiers(engine.cache, engine.pool, IDENTITY, options) as tiers:
            out, gained = serve(engine, tiers, tokens)
            assert gained == expected
            answers.append(out)
            engine.cache.check()
    assert torch.equal(*answers)
