"""Driver of vLLM's v1 `KVCacheManager` (and its BlockPool), one full-attention group, with sha256 or xxhash.

A request does what the scheduler does for it: `Request(...)`, which hashes the prompt's full blocks,
`get_computed_blocks`, `allocate_slots`, which locks the hit, takes blocks for the rest (evicting) and publishes the
full ones, and `free`. Block ids come from `get_block_ids`. A commit is `append_output_token_ids`, which hashes the new
blocks, and the coordinator's `cache_blocks`, which `allocate_slots` would call; the blocks were allocated before. An
eviction is `BlockPool.get_new_blocks` on a pool that is full: vLLM evicts when a block is taken, and has no other call
for a number of blocks. Prompts are given as lists of int, which is what vLLM itself works with.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from bench.cache.peers.stand_ins import stand_in
from bench.cache.workload import PAGE, Tokens

STAND_INS = ("xgrammar", "llguidance")
stand_in(STAND_INS)

import torch  # noqa: E402
from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.utils.hashing import get_hash_fn_by_name  # noqa: E402
from vllm.v1.core.kv_cache_manager import KVCacheManager  # noqa: E402
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec  # noqa: E402
from vllm.v1.request import Request  # noqa: E402

torch.set_num_threads(1)
MAX_LENGTH = 1 << 20
SAMPLING = SamplingParams(max_tokens=1)
_hash = get_hash_fn_by_name("sha256")


class Prepared(NamedTuple):
    """A request that is about to be committed, and what is new in it."""

    request: Request
    suffix: list[int]
    end: int


class VllmBlocks:
    def __init__(self, pages: int) -> None:
        spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
        config = KVCacheConfig(
            num_blocks=pages + 1,  # one is the null block
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        )
        self.manager = KVCacheManager(config, MAX_LENGTH, scheduler_block_size=PAGE, hash_block_size=PAGE)
        init_none_hash(_hash)
        self.hasher = get_request_block_hasher(PAGE, _hash)
        self.numbers = itertools.count()

    def native(self, tokens: Tokens) -> list[int]:
        return tokens.tolist()

    def claim(self, tokens: list[int]) -> tuple[Request, int]:
        request = Request(str(next(self.numbers)), tokens, SAMPLING, None, block_hasher=self.hasher)
        blocks, hit, _ = self.manager.get_computed_blocks(request)
        if self.manager.allocate_slots(request, len(tokens) - hit, hit, blocks) is None:
            raise RuntimeError(f"no room for {len(tokens) - hit} tokens")
        return request, hit

    def acquire(self, tokens: list[int]) -> Request:
        request, _ = self.claim(tokens)
        self.manager.get_block_ids(request.request_id)
        return request

    def release(self, claim: Request) -> None:
        self.manager.free(claim)

    def serve(self, tokens: list[int]) -> int:
        request, hit = self.claim(tokens)
        self.manager.free(request)
        return hit

    def prepare(self, prompt: list[int], whole: list[int]) -> Prepared:
        request, _ = self.claim(prompt)
        request.num_computed_tokens = len(prompt)
        suffix = whole[len(prompt) :]
        if self.manager.allocate_slots(request, len(suffix), delay_cache_blocks=True) is None:
            raise RuntimeError(f"no room for {len(suffix)} tokens")
        return Prepared(request, suffix, len(whole))

    def commit(self, claim: Prepared) -> None:
        claim.request.append_output_token_ids(claim.suffix)
        self.manager.coordinator.cache_blocks(claim.request, claim.end)

    def finish(self, claim: Prepared) -> None:
        self.manager.free(claim.request)

    def evict(self, pages: int) -> int:
        pool = self.manager.block_pool
        return len(pool.get_new_blocks(min(pages, pool.get_num_free_blocks())))


def use_hash(name: str) -> None:
    """Use vLLM's hash function of this name from now on."""
    global _hash
    _hash = get_hash_fn_by_name(name)


def make(pages: int) -> VllmBlocks:
    return VllmBlocks(pages)
