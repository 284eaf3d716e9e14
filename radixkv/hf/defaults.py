"""What a model's generation config asks for: taken as defaults of `Generator.submit`, or refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from radixkv.errors import InvalidArgument

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Defaults", "generation_defaults"]

_REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "typical_p": (1.0,),
    "top_h": (),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": (),
    "token_healing": (False,),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "diversity_penalty": (0.0,),
    "constraints": (),
    "force_words_ids": (),
    "prompt_lookup_num_tokens": (),
}
"""Fields that would change the tokens and that are not done, each with the values besides None that leave it off."""


@dataclass(frozen=True)
class Defaults:
    """Of one model's `generation_config`. What is wrong with them is said where a request takes them."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    max_new_tokens: int
    stop_tokens: Iterable[int]
    stop_strings: Iterable[str]
    deadline: float | None


def generation_defaults(model: PreTrainedModel) -> Defaults:
    """The defaults of `model`. Raises InvalidArgument for what would change its answers and is not done."""
    config = getattr(model, "generation_config", None)
    _refuse(config)

    def given(name: str, default: Any) -> Any:
        value = getattr(config, name, None)
        return default if value is None else value

    strings, ends = given("stop_strings", ()), given("eos_token_id", ())
    return Defaults(
        temperature=given("temperature", 1.0) if given("do_sample", False) else 0.0,
        top_k=given("top_k", 0),
        top_p=given("top_p", 1.0),
        min_p=given("min_p", 0.0),
        repetition_penalty=given("repetition_penalty", 1.0),
        max_new_tokens=given("max_new_tokens", 64),
        stop_tokens=ends if isinstance(ends, Iterable) else (ends,),
        stop_strings=(strings,) if isinstance(strings, str) else strings,
        deadline=given("max_time", None),
    )


def _refuse(config: Any) -> None:
    found = {name: getattr(config, name, None) for name in _REFUSED}
    active = [f"{name}={value!r}" for name, value in found.items() if value is not None and value not in _REFUSED[name]]
    if active:
        raise InvalidArgument(
            f"the model's generation_config asks for {', '.join(active)}, which is not done: set it to None in "
            "model.generation_config, and pass submit(processors=) what must be done"
        )
