"""A transformers `Cache` over the engine's pages, for `model.generate` on one sequence with the model's own attention.

A convenience with a price: the model's stock attention wants K and V in one piece, so every layer of every step
gathers the whole sequence out of its pages, O(tokens) memory traffic that the paged attention of `Generator` does not
have. It saves the prefill of a cached prefix, and nothing else.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from radixkv.errors import InvalidArgument, InvalidTokens
from radixkv.hf.adapter import ATTENTION, attention_name
from radixkv.hf.config import CACHE_ARGUMENTS, cache_argument, placeholder_tokens, refuse_placeholders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from radixkv.engine import Engine

__all__ = ["EngineCache"]


class EngineCache(Cache):  # type: ignore[misc]
    """K and V of one sequence, kept in the pages of `engine` and shared with every other request over them.

        with EngineCache(engine, model, input_ids) as past:
            output = past.generate(max_new_tokens=20)

    `input_ids` is the whole prompt, `[1, tokens]`. Leaving the block normally publishes what was computed, generated
    tokens included, so that the next prompt that continues it finds it; leaving it by an exception only releases. The
    cache learns the generated tokens from a hook on the model's forward, which leaving the block removes.

    One sequence: batches, beams, padding and cropping (assisted generation) are refused. Making one costs a forward
    pass of one token, which shows what the model stores in a cache. Raises InvalidArgument where that is not K and V of
    every layer in the engine's shape (models with latent attention cache latents, an engine that was made after
    `radixkv.hf.latent` stores them), and for a model that is switched to the engine's own attention; InvalidTokens
    for a prompt with placeholders of images; and later PoolExhausted where the sequence outgrows the pool.
    """

    def __init__(self, engine: Engine, model: PreTrainedModel, input_ids: torch.Tensor, *, namespace: str = "") -> None:
        if attention_name(model) == ATTENTION:
            raise InvalidArgument(
                "the model is switched to the engine's attention, which generate() does not drive: use "
                'radixkv.hf.Generator, or call model.set_attn_implementation("eager") first'
            )
        stored = {kv.format.k.dtype for kv in engine.pool.layers}
        if stored != {str(engine.dtype).removeprefix("torch.")}:
            raise InvalidArgument(
                f"the engine stores K and V as {', '.join(sorted(stored))}, which generate() cannot read: use an "
                "engine without kv_format"
            )
        if input_ids.ndim != 2 or input_ids.shape[0] != 1:
            raise InvalidArgument(
                f"input_ids have shape {tuple(input_ids.shape)}: one sequence, [1, tokens], is needed"
            )
        tokens = input_ids[0].cpu()
        refuse_placeholders(tokens.numpy(), placeholder_tokens(model))
        _check_stored(engine, model)
        super().__init__(layers=[_Layer(self, index) for index in range(len(engine.layers))])
        self.engine = engine
        self._model = model
        self._input_ids = input_ids
        self.lease = engine.acquire(tokens, namespace)
        self.num_cached = self.lease.num_cached
        """Tokens of the prompt that were found in the pages."""
        self._rows = torch.empty(0, dtype=torch.int64)
        self._slots = torch.empty(0, dtype=torch.int64)
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def generate(self, **options: Any) -> Any:
        """What `model.generate` returns for the prompt, computing only what is not cached; it takes the `options`."""
        ones = torch.ones_like(self._input_ids)  # else it would be guessed, and hide tokens that look like padding
        return self._model.generate(self._input_ids, **{cache_argument(): self, "attention_mask": ones, **options})

    def __enter__(self) -> EngineCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(commit=kind is None)

    def close(self, *, commit: bool = True) -> None:
        """Publish what was written (unless `commit` is False), release the pages and remove the hook."""
        self._hook.remove()
        if not self.lease.released:
            self.lease.release(commit=commit)

    def _before_forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make room for the rows of the coming forward pass, and learn their tokens."""
        if not any(kwargs.get(name) is self for name in CACHE_ARGUMENTS):
            return
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if input_ids is None or input_ids.shape[0] != 1:
            raise InvalidArgument("EngineCache holds one sequence: give input_ids of shape [1, tokens], and no beams")
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2 and not bool(mask.all()):
            raise InvalidArgument("attention_mask hides tokens: what follows them would be published as if it saw them")
        lease, new = self.lease, input_ids[0].tolist()
        start, end = lease.num_written, lease.num_written + len(new)
        if start >= lease.num_prompt and len(new) > start and new[:start] == lease.tokens[:start].tolist():
            raise InvalidArgument(
                f"{type(model).__name__} was given all {len(new)} tokens again, {start} of which are written: its "
                "generate() does not skip what its cache holds"
            )
        known = lease.tokens[start:end].tolist()
        if known != new[: len(known)]:
            raise InvalidTokens(
                f"tokens {start} to {end} differ from the prompt this cache was made for: pass generate() the same "
                "input_ids as EngineCache"
            )
        if end > lease.num_tokens:
            lease.extend(new[len(known) :])
        self._copy_shared_pages()
        size = self.engine.page_size
        pages = torch.from_numpy(lease.pages.astype("int64"))
        position = torch.arange(end)
        self._slots = (pages[position // size] * size + position % size).to(self.engine.pool.device)
        self._rows = self._slots[start:]

    def _copy_shared_pages(self) -> None:
        """Do the copies that the lease asks for before anything is written to its pages."""
        for source, target, _ in self.lease.copies:
            self.engine.pool.copy_pages(np.array([source], np.int32), np.array([target], np.int32))

    def _update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new K and V, `[1, num_kv_heads, rows, head_dim]`, and return those of the whole sequence."""
        kv = self.engine.pool.layers[layer]
        if kv.shape.latent:  # transformers caches a latent and a rotated part: one row here
            rows = self._stored(kv.k, torch.cat([keys, values], -1))
            found_keys, found_values = rows[..., : kv.shape.v_dim], rows[..., kv.shape.v_dim :]
        else:
            found_keys, found_values = self._stored(kv.k, keys), self._stored(kv.v, values)
        if layer == len(self.layers) - 1:
            self.lease.advance(len(self._rows))
        return found_keys, found_values

    def _stored(self, pool: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Write new rows, `[1, heads, rows, dim]`, and return those of the whole sequence."""
        pages, offsets = self._slots // self.engine.page_size, self._slots % self.engine.page_size
        new = len(self._rows)
        pool[pages[-new:], offsets[-new:]] = rows[0].transpose(0, 1)
        return pool[pages, offsets].transpose(0, 1).unsqueeze(0)


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """What transformers asks of the cache of one layer. A sliding layer keeps all its keys; the mask hides the old."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: EngineCache, index: int) -> None:
        super().__init__()
        self._cache = cache
        self._index = index

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to allocate: the pool exists."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._cache._update(self._index, key_states, value_states)

    def get_seq_length(self) -> int:
        return int(self._cache.lease.num_written)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise InvalidArgument("EngineCache cannot be cropped: assisted generation needs another cache")

    def reset(self) -> None:
        raise InvalidArgument("EngineCache cannot be reset: close it and make another for the next prompt")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise InvalidArgument("EngineCache holds one sequence: beam search needs another cache")


# ---- what a model stores in a cache ----


class _SeenLayer(CacheLayerMixin):  # type: ignore[misc]
    """Notes what a model stores in one layer of a cache."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.stored: list[tuple[int, int, int, torch.dtype]] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is kept."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        heads, key_dim, value_dim = key_states.shape[1], key_states.shape[-1], value_states.shape[-1]
        self.stored.append((heads, key_dim, value_dim, key_states.dtype))
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1


def _check_stored(engine: Engine, model: PreTrainedModel) -> None:
    """Run one token through `model` and refuse it if it stores anything else than the engine's pages hold."""
    name = type(model).__name__
    layers = [_SeenLayer() for _ in engine.layers]
    zero = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    try:
        with torch.inference_mode():
            model(input_ids=zero, use_cache=True, **{cache_argument(): Cache(layers=layers)})
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InvalidArgument(
            f"{name} wants another cache than one of K and V for each of the engine's {len(engine.layers)} layers: "
            f"{error}"
        ) from error
    for index, (layer, shape) in enumerate(zip(layers, engine.layers, strict=True)):
        if len(layer.stored) != 1:
            raise InvalidArgument(
                f"{name} stores K and V {len(layer.stored)} times in layer {index} of the engine's "
                f"{len(engine.layers)}, not once: layers that share K and V, or keep state of another kind, need "
                "transformers' own cache"
            )
        dims = (shape.v_dim, shape.k_dim - shape.v_dim) if shape.latent else (shape.k_dim, shape.v_dim)
        if layer.stored[0] != (shape.num_kv_heads, *dims, engine.dtype):
            heads, key_dim, value_dim, dtype = layer.stored[0]
            latents = any(hasattr(module, "expand_kv") for module in model.modules())
            raise InvalidArgument(
                f"layer {index} of {name} stores {heads} heads with keys of {key_dim} and values of {value_dim} "
                f"dimensions in {dtype}; the engine holds {shape.num_kv_heads} heads of {dims[0]} and {dims[1]} in "
                f"{engine.dtype}{'; these are latents: call radixkv.hf.latent(model) before engine_for' * latents}"
            )
