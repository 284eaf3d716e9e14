"""What the two SGLang drivers share: the page allocator and the life of a request around a tree.

A request does what the scheduler does for it: match all but the last token, lock the node, read the slots of the path,
evict what is missing, allocate, insert prompt and slots, free the slots of the open page and of what another request
has inserted meanwhile, unlock. Allocator: `PagedTokenToKVPoolAllocator.alloc` and `free_segment`. Left out, in SGLang's
favour: the request objects, the request-to-token table and the second match of `checkpoint`. Tokens are given as
array('q') and slots are not turned into page ids: both are what SGLang itself works with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from typing import Any, NamedTuple

import numpy as np

from bench.cache.peers.stand_ins import stand_in
from bench.cache.workload import PAGE, Tokens

STAND_INS = ("torchvision", "tvm_ffi", "compressed_tensors")
stand_in(STAND_INS)

import torch  # noqa: E402
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator  # noqa: E402
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams  # noqa: E402
from sglang.srt.mem_cache.radix_cache import RadixKey  # noqa: E402

torch.set_num_threads(1)


class Prepared(NamedTuple):
    """A request that is about to be committed: its lock, tokens, slots, and how many tokens were cached."""

    lock: Any
    tokens: array[int]
    slots: torch.Tensor
    cached: int


class SglangTree(ABC):
    """The request's life; a driver adds `match`, `lock`, `unlock`, `path`, `insert` and `evict_tokens`."""

    def __init__(self, pages: int) -> None:
        self.allocator = PagedTokenToKVPoolAllocator(pages * PAGE, PAGE, torch.bfloat16, "cpu", None, False)

    @abstractmethod
    def match(self, params: MatchPrefixParams) -> tuple[int, Any]: ...

    @abstractmethod
    def lock(self, node: Any) -> Any: ...

    @abstractmethod
    def unlock(self, lock: Any) -> None: ...

    @abstractmethod
    def path(self, node: Any) -> torch.Tensor: ...

    @abstractmethod
    def insert(self, params: InsertParams) -> None:
        """Insert; slots from prev_prefix_len on that the tree has already are freed."""

    @abstractmethod
    def evict_tokens(self, tokens: int) -> int: ...

    def native(self, tokens: Tokens) -> array[int]:
        out = array("q")
        out.frombytes(tokens.astype(np.int64).tobytes())
        return out

    def acquire(self, tokens: array[int]) -> Any:
        _, node = self.match(MatchPrefixParams(key=RadixKey(tokens, limit=len(tokens) - 1)))
        lock = self.lock(node)
        self.path(node)
        return lock

    def release(self, claim: Any) -> None:
        self.unlock(claim)

    def claim(self, tokens: array[int]) -> Prepared:
        cached, node = self.match(MatchPrefixParams(key=RadixKey(tokens, limit=len(tokens) - 1)))
        lock = self.lock(node)
        need = -(-(len(tokens) - cached) // PAGE) * PAGE
        short = need - self.allocator.available_size()
        if short > 0:
            self.evict_tokens(short)
        new = self.allocator.alloc(need)
        if new is None:
            raise RuntimeError(f"no room for {need} tokens")
        return Prepared(lock, tokens, torch.cat([self.path(node), new]), cached)

    def publish(self, claim: Prepared) -> None:
        full = len(claim.tokens) // PAGE * PAGE
        key = RadixKey(claim.tokens, limit=full).page_aligned(PAGE)
        self.insert(InsertParams(key=key, value=claim.slots[:full], prev_prefix_len=claim.cached))
        if full < len(claim.tokens):
            self.allocator.free_segment(claim.slots[full:], start_pos=full)

    def serve(self, tokens: array[int]) -> int:
        claim = self.claim(tokens)
        self.publish(claim)
        self.unlock(claim.lock)
        return claim.cached

    def prepare(self, prompt: array[int], whole: array[int]) -> Prepared:
        return self.claim(whole)

    def commit(self, claim: Prepared) -> None:
        self.publish(claim)

    def finish(self, claim: Prepared) -> None:
        self.unlock(claim.lock)

    def evict(self, pages: int) -> int:
        return self.evict_tokens(pages * PAGE) // PAGE
