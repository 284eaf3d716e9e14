"""Latent attention (MLA) stored as it is: models like DeepSeek's cache latents, not K and V of every head."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from radixkv.errors import InvalidArgument
from radixkv.hf.absorbed import absorb
from radixkv.hf.adapter import ATTENTION, engine_attention, probe, running
from radixkv.hf.config import telling_positions, text_config
from radixkv.hf.layers import position_arguments, step_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["latent"]

_PARTS = ("kv_b_proj", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")


def latent(model: PreTrainedModel) -> None:
    """Let the attention of `model` store one latent row a token and layer, in place of K and V of every head.

    For models with multi-head latent attention: DeepSeek V2, V3 and R1, Kimi K2, GLM-4.7-Flash, MiniCPM3, LongCat and
    others. DeepSeek-V3 then takes 70,272 B a token in 16 bits, where K and V of its heads take 4,997,120 B. On the
    engine queries are multiplied with the key half of `kv_b_proj`, outputs with its value half, for every row alike;
    the weights stay as they are, so the model can still be saved, moved and converted, and runs as before without the
    engine. Call it before `engine_for`, which then makes latent layers.

    The answers are those of the same model in other roundings: in bf16 a greedy token can differ where two logits are
    within rounding. That a cached prefix changes no answer holds as before. A row of 512 + 64 takes about 3.4 times the
    multiplications of a head of 192 + 128, so it is the memory, not the time of a short prompt, that gains.

    Each attention module is compared with what it becomes, in float32, on random rows at positions up to the model's
    last, before anything is changed.

    Raises InvalidArgument, and leaves the model as it was, for a model without latent attention, one whose modules
    are built otherwise, one in training mode, and what `engine_for` refuses.
    """
    name = type(model).__name__
    if model.training:
        raise InvalidArgument(f"{name} is in training mode: call model.eval() first")
    modules = {where: module for where, module in model.named_modules() if hasattr(module, "kv_b_proj")}
    if not modules:
        probe(model)  # what it says of other models is more to the point
        raise InvalidArgument(
            f"{name} has no latent attention (no module with kv_b_proj): leave latent() out, K and V of its heads "
            "are all there is to store"
        )
    for where, module in modules.items():
        _check_parts(module, f"{where} of {name}")
    probe(model)
    with engine_attention(model), torch.inference_mode():
        for where, arguments in _calls(model, modules).items():
            _compare(modules[where], arguments, f"{where} of {name}")
    for module in modules.values():
        absorb(module, ATTENTION)


def _check_parts(module: Any, where: str) -> None:
    """Refuse a module that is not built as the replacement takes for granted."""
    if "expand_kv" in vars(module):
        raise InvalidArgument(f"{where} stores latents already: call latent() once")
    missing = [part for part in _PARTS if not hasattr(module, part)]
    if not hasattr(type(module), "expand_kv"):
        missing.append("expand_kv (transformers 5.24 or later)")
    if missing:
        raise InvalidArgument(
            f"{where} is a {type(module).__name__} without {', '.join(missing)}: latent() cannot rewrite it; without "
            "latent() the engine stores its K and V expanded"
        )
    project = module.kv_b_proj
    if type(project) is not nn.Linear or project.bias is not None:
        what = "has a bias" if type(project) is nn.Linear else f"is a {type(project).__name__}"
        raise InvalidArgument(
            f"kv_b_proj in {where} {what}: latent() divides the weight of an nn.Linear without bias between queries "
            "and outputs; load the model without quantization or adapters, or leave latent() out"
        )
    if project._forward_hooks or project._forward_pre_hooks:
        raise InvalidArgument(f"kv_b_proj in {where} has forward hooks, which latent() would lose")


def _calls(model: PreTrainedModel, modules: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """How each module is called, as keyword arguments, in a pass over rows at telling positions."""
    config = text_config(model)
    positions = torch.tensor(telling_positions(model), device=model.device)
    calls: dict[str, dict[str, Any]] = {}

    def note(where: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[where] = kwargs | ({"hidden_states": args[0]} if args else {})

        return hook

    hooks = [module.register_forward_pre_hook(note(where), with_kwargs=True) for where, module in modules.items()]
    try:
        with running(step_for(config, _Dense())):
            tokens = torch.zeros_like(positions)[None]
            more = position_arguments(config, positions)
            model(input_ids=tokens, position_ids=positions[None], use_cache=False, **more)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _compare(module: Any, arguments: dict[str, Any], where: str) -> None:
    """Refuse a module that computes something else with latents, told in float32 on random rows."""
    arguments = {name: _float(value) for name, value in arguments.items()}
    hidden = arguments["hidden_states"]
    generator = torch.Generator().manual_seed(0)
    arguments["hidden_states"] = torch.randn(hidden.shape, generator=generator).to(hidden.device)
    reference = copy.deepcopy(module).float()
    with running(_Dense()):
        expected = reference(**arguments)[0]
        absorb(reference, ATTENTION)
        try:
            found = reference(**arguments)[0]
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:
            raise InvalidArgument(f"{where} cannot be rewritten by latent(): {error}") from error
    scale = float(expected.abs().max())
    difference = float((expected - found).abs().max())
    if not difference <= 1e-3 * scale:
        raise InvalidArgument(
            f"{where} computes something else over latents (it differs by {difference:.2g} of {scale:.2g}), so "
            "latent() cannot rewrite it; without latent() the engine stores its K and V expanded"
        )


def _float(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_float, value))
    is_real = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.float() if is_real else value


class _Dense:
    """Stands in for a step of one request: attends to the rows before each, with a matrix of scores."""

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, sm_scale: float, **options: Any
    ) -> torch.Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * sm_scale
        later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), v)
