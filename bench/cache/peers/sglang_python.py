"""Driver of SGLang's Python tree, `sglang.srt.mem_cache.radix_cache.RadixCache`.

Calls match_prefix, inc_lock_ref, path_device_indices, insert, evict and dec_lock_ref, the interface through which the
scheduler uses the tree (`BasePrefixCache`); see sglang_tree for the order.
"""

from __future__ import annotations

from typing import Any

from bench.cache.peers.sglang_tree import SglangTree

import torch  # isort: skip
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixCache

from bench.cache.workload import PAGE


class SglangPython(SglangTree):
    def __init__(self, pages: int) -> None:
        super().__init__(pages)
        self.cache = RadixCache(
            CacheInitParams(
                disable=False, req_to_token_pool=None, token_to_kv_pool_allocator=self.allocator, page_size=PAGE
            )
        )

    def match(self, params: MatchPrefixParams) -> tuple[int, Any]:
        found = self.cache.match_prefix(params)
        return found.device_prefix_len, found.last_device_node

    def lock(self, node: Any) -> Any:
        self.cache.inc_lock_ref(node)
        return node

    def unlock(self, lock: Any) -> None:
        self.cache.dec_lock_ref(lock)

    def path(self, node: Any) -> torch.Tensor:
        return self.cache.path_device_indices(node)

    def insert(self, params: InsertParams) -> None:
        there, cached = self.cache.insert(params).prefix_len, params.prev_prefix_len
        if there > cached:
            self.allocator.free_segment(params.value[cached:there], start_pos=cached)

    def evict_tokens(self, tokens: int) -> int:
        return self.cache.evict(EvictParams(num_tokens=tokens)).num_tokens_evicted


def make(pages: int) -> SglangPython:
    return SglangPython(pages)
