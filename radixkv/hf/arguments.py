"""What the calls of radixkv.hf may be given. Each check returns the value as a plain one, or says what to give."""

from __future__ import annotations

import inspect
import numbers
import operator
from collections.abc import Iterable
from reprlib import repr as shown
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from radixkv.engine import Engine
from radixkv.errors import InvalidArgument, InvalidTokens
from radixkv.hf.adapter import length_limit, probe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from radixkv.hf.request import OnToken, Tokens

__all__ = [
    "check_callback",
    "check_engine",
    "check_model",
    "check_namespace",
    "check_token_set",
    "check_tokens",
    "end_tokens",
    "integer",
    "length_for",
    "number",
]


def integer(name: str, value: Any, least: int, most: int = 2**63 - 1) -> int:
    """`value` as an int in a range: an int of any library, but no bool and no float."""
    try:
        whole = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        whole = None
    if whole is None:
        raise InvalidArgument(f"{name} is {shown(value)}: give a whole number, at least {least}")
    if not least <= whole <= most:
        bound = f"at least {least}" if whole < least else f"at most {most}"
        raise InvalidArgument(f"{name} is {whole}: give {bound}")
    return whole


def number(name: str, value: Any) -> float:
    """`value` as a float: a real number of any library, but no bool."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass
    raise InvalidArgument(f"{name} is {shown(value)}: give a number that a float can hold")


def check_tokens(tokens: Tokens, vocabulary: int) -> np.ndarray:
    """`tokens` as int32 `[n]`, a copy, each checked to be one of a `vocabulary`; raises InvalidTokens."""
    try:
        array = np.asarray(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidTokens(f"tokens are not a sequence of integers: {error}") from error
    if array.ndim != 1 or array.size == 0:
        raise InvalidTokens(f"tokens have shape {array.shape}: give a non-empty, one-dimensional sequence")
    if not np.issubdtype(array.dtype, np.integer):
        raise InvalidTokens(f"tokens are {array.dtype}: give integers")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocabulary:
        raise InvalidTokens(f"tokens range from {low} to {high}: the model's embedding takes 0 to {vocabulary - 1}")
    return array.astype(np.int32)


def check_token_set(name: str, tokens: Any, vocabulary: int) -> frozenset[int]:
    """A collection of token ids of a `vocabulary`, each an int."""
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Iterable):
        example = f", such as [{tokens}]" if isinstance(tokens, int) else ""
        raise InvalidArgument(f"{name} is {shown(tokens)}: give a sequence of token ids{example}")
    return frozenset(integer(f"{name}[{i}]", token, 0, vocabulary - 1) for i, token in enumerate(tokens))


def check_namespace(namespace: Any) -> str:
    """A str that the cache can take: it keeps names as UTF-8."""
    if not isinstance(namespace, str):
        raise InvalidArgument(f"namespace is {shown(namespace)}: give a str, '' for the common one")
    try:
        namespace.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"namespace is {shown(namespace)}, which UTF-8 cannot encode: {error.reason}") from error
    return namespace


def check_callback(name: str, callback: Any) -> OnToken | None:
    """None or something to call at once."""
    if callback is not None and not callable(callback):
        raise InvalidArgument(f"{name} is {shown(callback)}: give a callable or None")
    if inspect.iscoroutinefunction(callback):
        raise InvalidArgument(
            f"{name} is a coroutine function, which nothing would await: give a function, such as a queue's put_nowait"
        )
    return cast("OnToken | None", callback)


# ---- a model and its engine ----


def check_model(model: Any) -> None:
    """Refuse what no causal language model of transformers could be; `probe` looks closer."""
    if not (isinstance(model, torch.nn.Module) and hasattr(model, "config")):
        raise InvalidArgument(
            f"model is {shown(model)}: give a model of transformers, such as "
            "AutoModelForCausalLM.from_pretrained(...).eval()"
        )
    if model.training:
        raise InvalidArgument("the model is in training mode, where dropout may change its answers: call model.eval()")


def check_engine(engine: Any, model: PreTrainedModel) -> None:
    """Refuse an engine that was made for another model."""
    if not isinstance(engine, Engine):
        raise InvalidArgument(f"engine is {shown(engine)}: give an Engine, such as engine_for(model, capacity=0.5)")
    shape, geometry = probe(model), engine.geometry
    pairs = {
        "num_layers": (geometry.num_layers, shape.num_layers),
        "num_qo_heads": (geometry.num_qo_heads, shape.num_qo_heads),
        "num_kv_heads": (geometry.num_kv_heads, shape.num_kv_heads),
        "head_dim": (geometry.head_dim, shape.head_dim),
        "dtype": (engine.dtype, shape.dtype),
        "device": (engine.device, model.device),
    }
    different = "; ".join(f"{name} {ours}, the model {its}" for name, (ours, its) in pairs.items() if ours != its)
    if different:
        raise InvalidArgument(f"the engine has {different}: make it with engine_for(model, ...), or convert the model")


def length_for(model: PreTrainedModel, max_length: Any) -> int | None:
    """`max_length` as given, or what the model was built for."""
    limit = length_limit(model)
    if max_length is None:
        return limit
    length = integer("max_length", max_length, 2)
    if limit is not None and length > limit:
        raise InvalidArgument(f"max_length is {length}: the model was built for {limit} tokens, give {limit} at most")
    return length


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The end-of-sequence tokens of the model's generation config."""
    config = getattr(model, "generation_config", None)
    tokens = getattr(config, "eos_token_id", None)
    if tokens is None:
        return frozenset()
    return frozenset([int(tokens)] if isinstance(tokens, int) else map(int, tokens))
