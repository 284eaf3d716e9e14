"""Tiny random models, built in code, and what the tests of radixkv.hf ask of an engine afterwards.

Importing this module first skips a test module where transformers is not installed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from radixkv import Engine

transformers = pytest.importorskip("transformers", minversion="5.20")

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}

# Every entry: configuration class, model class, what differs from SIZES.
ARCHITECTURES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "gemma2-window-softcap": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {"sliding_window": 8, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 24},
    ),
    "gemma3-window": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"sliding_window": 8}),
    "mistral-window": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 8}),
    "phi3-packed-qkv": ("Phi3Config", "Phi3ForCausalLM", {}),
    "gpt2-learned-positions": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512},
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "gemma3n-shared-kv": (
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 8,
            "intermediate_size": [96] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
        },
    ),
    "stablelm-no-keywords": ("StableLmConfig", "StableLmForCausalLM", {}),
    "nemotron-no-keywords": ("NemotronConfig", "NemotronForCausalLM", {}),
    "granite-hybrid-attention-only": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {
            "layer_types": ["full_attention"] * 3,
            "num_local_experts": 4,
            "shared_intermediate_size": 32,
            "mamba_n_heads": 8,
            "position_embedding_type": "rope",
        },
    ),
}

IMAGE = 90
"""The token that stands for an image in `vision_model()`."""


def random_model(config_name: str, model_name: str, options: dict[str, object]) -> "transformers.PreTrainedModel":
    """A random fp32 model of a transformers class."""
    torch.manual_seed(7)
    config = getattr(transformers, config_name)(**options)
    return getattr(transformers, model_name)(config).eval()


def build(
    config_name: str, model_name: str, changes: dict[str, object], sizes: dict[str, object] = SIZES
) -> "transformers.PreTrainedModel":
    """A tiny random causal LM with the stock "eager" attention."""
    if config_name == "GPT2Config":
        sizes = {key: SIZES[key] for key in ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id")}
    model = random_model(config_name, model_name, {**sizes, **changes})
    model.set_attn_implementation("eager")
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def vision_model() -> "transformers.PreTrainedModel":
    """A tiny random LLaVA: a CLIP vision tower and a Llama."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "projection_dim": 32, **sizes}
    parts = {"text_config": {"model_type": "llama", **SIZES}, "vision_config": vision, "image_token_index": IMAGE}
    return build("LlavaConfig", "LlavaForConditionalGeneration", parts, {})


def tiny(architecture: str = "llama") -> transformers.PreTrainedModel:
    return build(*ARCHITECTURES[architecture])


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from threads, and lose much where other processes keep the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_prompts(*lengths: int, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def stock_tokens(model: transformers.PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of transformers' own generate with eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    output = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    model.set_attn_implementation(before)
    return output[0, len(prompt) :].tolist()


def assert_drains(engine: Engine) -> None:
    """Nothing holds a page any more, and evicting everything leaves every page free."""
    engine.cache.check()
    stats = engine.cache.stats()
    assert (stats.num_leases, stats.private, stats.protected) == (0, 0, 0)
    engine.cache.evict(engine.num_pages)
    engine.cache.check()
    assert engine.cache.stats().free == engine.num_pages
