"""What the calls of radixkv.hf may be given. Each check returns the value as a plain one, or says what to give."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from reprlib import repr as shown
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from radixkv.engine import Engine
from radixkv.errors import InvalidArgument
from radixkv.hf.adapter import AttentionShape, length_limit
from radixkv.scheduling.arguments import integer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_callback", "check_content", "check_engine", "check_model", "length_for"]

F = TypeVar("F", bound=Callable[..., object])


def check_callback(name: str, callback: F | None) -> F | None:
    """None or something to call at once."""
    if callback is not None and not callable(callback):
        raise InvalidArgument(f"{name} is {shown(callback)}: give a callable or None")
    if inspect.iscoroutinefunction(callback):
        raise InvalidArgument(
            f"{name} is a coroutine function, which nothing would await: give a function, such as a queue's put_nowait"
        )
    return callback


def check_content(content: Any) -> Mapping[str, Any] | Sequence[Any]:
    """A mapping, a list or a tuple; what is in it is looked at where it is placed."""
    if not isinstance(content, Mapping | list | tuple):
        raise InvalidArgument(
            f"content is {shown(content)}: give what the model's processor made of the prompt, "
            "or a list with a mapping of tensors for each picture"
        )
    return content


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


def check_engine(engine: Any, shape: AttentionShape, device: torch.device) -> None:
    """Refuse an engine that was made for another model than one of this `shape`."""
    if not isinstance(engine, Engine):
        raise InvalidArgument(f"engine is {shown(engine)}: give an Engine, such as engine_for(model, capacity=0.5)")
    pairs: dict[str, tuple[object, object]] = {"num_layers": (len(engine.layers), len(shape.layers))}
    for layer, (ours, its) in enumerate(zip(engine.layers, shape.layers, strict=False)):
        if ours != its:
            pairs[f"layer {layer} as"] = (ours, its)
            break
    pairs |= {
        "dtype": (engine.dtype, shape.dtype),
        "device": (engine.device, device),
    }
    different = "; ".join(f"{name} {own}, the model {its}" for name, (own, its) in pairs.items() if own != its)
    if different:
        raise InvalidArgument(f"the engine has {different}: make it with engine_for(model, ...), or convert the model")


def length_for(model: PreTrainedModel, max_length: Any) -> int | None:
    """`max_length` as given, or that of the generation config, or what the model was built for."""
    limit = length_limit(model)
    if max_length is None:
        asked = getattr(getattr(model, "generation_config", None), "max_length", None)
        own = None if asked is None else integer("generation_config.max_length", asked, 2)
        return min((length for length in (limit, own) if length is not None), default=None)
    length = integer("max_length", max_length, 2)
    if limit is not None and length > limit:
        raise InvalidArgument(f"max_length is {length}: the model was built for {limit} tokens, give {limit} at most")
    return length
