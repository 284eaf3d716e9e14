"""Driver of SGLang's compiled tree, `sglang.srt.mem_cache.rust_tree_core`, the default backend of its unified cache.

Calls `RustUnifiedTreeCore`, the thin Python adapter over the extension, directly: match_prefix, inc_lock_ref,
collect_full_device_indices, begin_insert / resume_insert / end_insert, evict_device_* and dec_lock_ref, in the order in
which `UnifiedRadixCache` calls them, without that class's own layers (sessions, linkers, metrics), in SGLang's favour.
Slots that a step gives back go to the allocator.
"""

from __future__ import annotations

from typing import Any

from bench.cache.peers.sglang_tree import SglangTree

import torch  # isort: skip
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.rust_tree_core.adapter import RustUnifiedTreeCore
from sglang.srt.mem_cache.unified_cache.cache_action import FreeDeviceKV, FreeDeviceKVFullOnly
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from bench.cache.workload import PAGE

FULL = ComponentType.FULL


class SglangRust(SglangTree):
    def __init__(self, pages: int) -> None:
        super().__init__(pages)
        self.core = RustUnifiedTreeCore(
            CacheInitParams(
                disable=False,
                req_to_token_pool=None,
                token_to_kv_pool_allocator=self.allocator,
                page_size=PAGE,
                tree_components=(FULL,),
            )
        )

    def match(self, params: MatchPrefixParams) -> tuple[int, Any]:
        found = self.core.match_prefix(params)
        return found.device_prefix_len, found.last_device_node

    def lock(self, node: Any) -> Any:
        return node, self.core.inc_lock_ref(node).to_dec_params()

    def unlock(self, lock: Any) -> None:
        self.core.dec_lock_ref(*lock)

    def path(self, node: Any) -> torch.Tensor:
        return self.core.collect_full_device_indices(node, self.core.root_node_handle())

    def insert(self, params: InsertParams) -> None:
        step = self.core.begin_insert(params)
        while True:
            self.apply(step.actions)
            if step.result is not None:
                break
            step = self.core.resume_insert()
        self.apply(self.core.end_insert())

    def apply(self, actions: list[Any]) -> None:
        while actions:
            action = actions.pop()
            if not isinstance(action, (FreeDeviceKV, FreeDeviceKVFullOnly)):
                raise RuntimeError(f"an action that a plain tree has no use for: {action}")
            for indices in action.indices:
                self.allocator.free_segment(indices, start_pos=0)

    def take(self, result: Any, tracker: dict[Any, int]) -> None:
        while result.device_frees:
            for indices in result.device_frees.popitem()[1]:
                self.allocator.free_segment(indices, start_pos=0)
        self.apply(result.cache_actions)
        for component, count in result.tracker.items():
            tracker[component] += count

    def evict_tokens(self, tokens: int) -> int:
        tracker = {FULL: 0}
        self.core.evict_device_start(FULL, tokens)
        try:
            while True:
                step = self.core.evict_device_next_node(FULL, tracker)
                self.take(step, tracker)
                if step.node_id is not None:
                    self.take(self.core.evict_device_leaf(step.node_id, False), tracker)
                elif not step.made_progress:
                    break
        finally:
            self.core.evict_device_end(FULL)
        return tracker[FULL]


def make(pages: int) -> SglangRust:
    return SglangRust(pages)
