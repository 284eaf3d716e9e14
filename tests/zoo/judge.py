"""What becomes of one family on the engine: it runs and answers as stock transformers does, or is refused, and why."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from unittest import mock

import torch
import transformers

from radixkv import Engine, InvalidArgument
from radixkv.hf import EngineCache, Generator, engine_for, latent, optimize
from radixkv.scheduling import space
from tests.zoo.families import WORDS, build

COUNT = 8
"""Tokens generated for each prompt."""

MISSING = "needs a package that is not installed here"

# Why a family is refused, and the words of the error that say so.
REASONS = {
    "state between tokens": r"layers of type .*(linear_attention|conv|hybrid|mamba)|keeps recurrent",
    "sparse attention": r"layers of type .*(indexed|compressed|reference|sparse)",
    "more or fewer than one attention a layer": r"every layer must attend exactly once",
    "own attention code": r"does not look its attention up",
    "encoder-decoder": r"is an encoder-decoder model",
    "not causal": r"is not causal",
    "mask of its own": r"passes an attention mask",
    "positions or state by place in the batch": r"computes other rows when their order changes",
    "positions counted from elsewhere": r"than without position_ids",
    "window not told to attention": r"tells its attention",
    "needs more than tokens": r"cannot run on tokens alone|has no single vocabulary",
    "head dimension": r"[kv]_dim is \d+",
}

CACHE_REASONS = {
    "K and V shared by layers": r"stores K and V \d+ times",
    "after `latent`": r"call radixkv.hf.latent",
    "other shapes in the cache": r"the engine holds \d+ heads",
    "given cache not used": r"does not skip what its cache holds",
    "other state in the cache": r"wants another cache",
}


@dataclass(frozen=True)
class Verdict:
    """`verdict` is "runs", "refused", "untestable" or "wrong"; the others say how it fared besides."""

    verdict: str
    reason: str = ""
    optimized: str = ""
    cached: str = ""
    latent: str = ""


def judge(name: str) -> Verdict:
    """Build a family and try it. "wrong" means that the engine has a fault."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        try:
            model = build(name)
        except Exception as error:
            return Verdict("untestable", _short(error))
        try:
            engine = engine_for(model, num_pages=128, page_size=4)
        except InvalidArgument as error:
            return Verdict("refused", reason(str(error), REASONS))
        prompts = sample_prompts()
        try:
            expected = [stock(model, prompt) for prompt in prompts]
        except Exception as error:
            return Verdict("untestable", f"stock generate fails: {_short(error)}")
        return _compare(model, engine, prompts, expected)


def _short(error: Exception) -> str:
    """The telling line of an error of transformers: the first, or the last of a chain of failed validations."""
    if isinstance(error, ImportError):
        return MISSING
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    line = lines[-1] if "alidation error" in lines[0] else f"{type(error).__name__}: {lines[0]}"
    return line if len(line) <= 120 else f"{line[:117]}..."


def _compare(
    model: transformers.PreTrainedModel, engine: Engine, prompts: list[list[int]], expected: list[list[int]]
) -> Verdict:
    if len({token for tokens in expected for token in tokens}) == 1:
        return Verdict("wrong", "every token is the same: the model tells nothing")
    for state in ("cold", "warm"):
        if run(model, engine, prompts)[0] != expected:
            return Verdict("wrong", f"other tokens than stock, {state}")
    with mock.patch.object(space, "HEADROOM", 0):  # or nobody would be preempted
        tokens, preemptions = run(model, engine_for(model, num_pages=11, page_size=4), prompts)
    if tokens != expected or preemptions == 0:
        return Verdict("wrong", f"{preemptions} preemptions, {'' if tokens == expected else 'other tokens than stock'}")
    cached = _through_cache(model, engine, prompts[0], expected[0])
    latents = _latent(model, prompts, expected)  # undone by another attention; optimize() is for good
    optimized = _optimized(model, prompts, expected)
    wrong = "other tokens" in cached + latents + optimized
    return Verdict("wrong" if wrong else "runs", "", optimized, cached, latents)


def run(model: transformers.PreTrainedModel, engine: Engine, prompts: list[list[int]]) -> tuple[list[list[int]], int]:
    """The greedy tokens of all prompts at once, and how often one was preempted."""
    with Generator(model, engine) as generator:
        requests = [generator.submit(prompt, max_new_tokens=COUNT, stop_tokens=()) for prompt in prompts]
        generator.run()
    return [request.tokens for request in requests], sum(request.stats.preemptions for request in requests)


def _through_cache(model: transformers.PreTrainedModel, engine: Engine, prompt: list[int], expected: list[int]) -> str:
    model.set_attn_implementation("eager")
    engine.cache.clear()
    input_ids = torch.tensor([prompt])
    for state, cached in (("cold", 0), ("warm", len(prompt) - 1)):
        try:
            with EngineCache(engine, model, input_ids) as past:
                output = past.generate(max_new_tokens=COUNT, do_sample=False)
        except InvalidArgument as error:
            return reason(str(error), CACHE_REASONS)
        if output[0, len(prompt) :].tolist() != expected or past.num_cached != cached:
            return f"other tokens than stock, {state}"
    return "yes"


def _latent(model: transformers.PreTrainedModel, prompts: list[list[int]], expected: list[list[int]]) -> str:
    """Empty for a model that has no latent attention."""
    try:
        latent(model)
    except InvalidArgument as error:
        return "" if "has no latent attention" in str(error) else "no"
    engine = engine_for(model, num_pages=128, page_size=4)
    for state in ("cold", "warm"):
        if not all(shape.latent for shape in engine.layers) or run(model, engine, prompts)[0] != expected:
            return f"other tokens than stock, or other layers, latent, {state}"
    cached = _through_cache(model, engine, prompts[0], expected[0])
    return "yes" if cached == "yes" else f"in EngineCache: {cached}"


def _optimized(model: transformers.PreTrainedModel, prompts: list[list[int]], expected: list[list[int]]) -> str:
    try:
        optimize(model)
    except InvalidArgument:
        return "no"
    tokens, _ = run(model, engine_for(model, num_pages=128, page_size=4), prompts)
    return "yes" if tokens == expected else "other tokens than stock, optimized"


def reason(message: str, reasons: dict[str, str]) -> str:
    """The reason that an error message gives, or the message itself where it is none that is known."""
    return next((name for name, words in reasons.items() if re.search(words, message)), message)


def sample_prompts() -> list[list[int]]:
    """Five prompts; the last shares its beginning with the first."""
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randint(3, WORDS, (length,), generator=generator).tolist() for length in (33, 1, 18, 5)]
    return [*drawn, drawn[0][:21] + drawn[3]]


def stock(model: transformers.PreTrainedModel, prompt: list[int]) -> list[int]:
    """Greedy tokens of transformers' own generate."""
    input_ids = torch.tensor([prompt])
    mask = torch.ones_like(input_ids)
    output = model.generate(input_ids, attention_mask=mask, max_new_tokens=COUNT, do_sample=False)
    return output[0, len(prompt) :].tolist()
