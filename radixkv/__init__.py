"""radixkv: a prefix-sharing KV-cache engine to embed in an LLM inference loop.

`PrefixCache` is the bookkeeping alone (pages and tokens, no tensors); `Engine` adds the page pool and attention and
imports torch when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from radixkv.cache import BestMatch, Fit, Lease, NamespaceUse, Pin, PrefixCache, Stats, best_match
from radixkv.content import content_tokens
from radixkv.errors import (
    BackendUnavailable,
    InvalidArgument,
    InvalidLogits,
    InvalidTokens,
    LeaseError,
    ModelNotFound,
    NotCached,
    PoolExhausted,
    QueueFull,
    RadixKVError,
    TraceError,
)
from radixkv.kv_plan import KvPlan

if TYPE_CHECKING:
    from radixkv.engine import Engine
    from radixkv.step import Step

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "BestMatch",
    "Engine",
    "Fit",
    "InvalidArgument",
    "InvalidLogits",
    "InvalidTokens",
    "KvPlan",
    "Lease",
    "LeaseError",
    "ModelNotFound",
    "NamespaceUse",
    "NotCached",
    "Pin",
    "PoolExhausted",
    "PrefixCache",
    "QueueFull",
    "RadixKVError",
    "Stats",
    "Step",
    "TraceError",
    "best_match",
    "content_tokens",
]


def __getattr__(name: str) -> Any:
    """`Engine` and `Step` on first use: they need torch, and nothing else here does."""
    if name not in ("Engine", "Step"):
        raise AttributeError(f"module 'radixkv' has no attribute {name!r}")
    try:
        from radixkv import engine, step
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise BackendUnavailable(f"radixkv.{name} needs torch: pip install 'radixkv[engine]'") from error
    return engine.Engine if name == "Engine" else step.Step
