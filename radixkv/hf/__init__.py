"""Hugging Face Transformers on the engine: an adapter for any model, a generation loop, and a `Cache` object.

Needs the extra `radixkv[hf]` (transformers 5.20 or later).
"""

from radixkv.errors import BackendUnavailable

try:
    from radixkv.hf.adapter import attach, engine_for, forward
    from radixkv.hf.aio import AsyncGenerator, Stream
    from radixkv.hf.cache import EngineCache
    from radixkv.hf.digest import weights_digest
    from radixkv.hf.generator import Generator
    from radixkv.hf.kv_check import KvCheck, kv_check
    from radixkv.hf.kv_measure import Loss, audit
    from radixkv.hf.latent import latent
    from radixkv.hf.optimize import optimize
    from radixkv.hf.request import Request, RequestStats
    from radixkv.hf.sampling import Sampling, TokenLogprob
except ImportError as error:
    if (error.name or "").split(".")[0] not in ("torch", "transformers", "tokenizers"):
        raise
    raise BackendUnavailable(f"radixkv.hf needs torch and transformers ({error}): pip install 'radixkv[hf]'") from error

__all__ = [
    "AsyncGenerator",
    "EngineCache",
    "Generator",
    "KvCheck",
    "Loss",
    "Request",
    "RequestStats",
    "Sampling",
    "Stream",
    "TokenLogprob",
    "attach",
    "audit",
    "engine_for",
    "forward",
    "kv_check",
    "latent",
    "optimize",
    "weights_digest",
]
