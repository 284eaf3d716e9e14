"""EngineCache: transformers' own generate over the engine's pages."""

import inspect
import warnings

import pytest
import torch

from radixkv import Engine, InvalidArgument, InvalidTokens, PoolExhausted
from radixkv.hf import EngineCache, Generator, engine_for
from tests.hf.helpers import (
    IMAGE,
    assert_drains,
    build,
    random_prompts,
    stock_tokens,
    tiny,
    transformers,
    vision_model,
)

LlamaForCausalLM = transformers.LlamaForCausalLM


NAME = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""What the installed transformers calls the argument."""


def generate(model, engine, prompt, count, **options):
    """Greedy tokens through EngineCache, and how many prompt tokens were cached."""
    input_ids = torch.tensor([prompt])
    with EngineCache(engine, model, input_ids) as past:
        output = past.generate(max_new_tokens=count, do_sample=False, **options)
    return output[0, len(prompt) :].tolist(), past.num_cached


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [
        ("llama", "eager"),
        ("llama", "sdpa"),
        ("gemma2-window-softcap", "eager"),
        ("mistral-window", "eager"),
        ("mistral-window", "sdpa"),
    ],
)
def test_generate_equals_stock_cold_and_warm(architecture, attention):
    model = tiny(architecture)
    prompt = random_prompts(27)[0]
    expected = stock_tokens(model, prompt, 10)
    model.set_attn_implementation(attention)
    engine = engine_for(model, num_pages=32, page_size=4)
    assert generate(model, engine, prompt, 10) == (expected, 0)
    assert generate(model, engine, prompt, 10) == (expected, 26)
    longer = prompt + expected + [5, 6]
    tokens, cached = generate(model, engine, longer, 6)
    assert cached == len(prompt) + 9, "all but the last generated token were written and published"
    assert tokens == stock_tokens(model, longer, 6)
    assert_drains(engine)


@pytest.mark.parametrize("name", sorted({NAME, "past_key_values"}))
def test_both_names_of_the_argument_are_understood(name):
    """By generate and by forward, as far as the installed transformers does."""
    model = tiny()
    prompt = random_prompts(12)[0]
    engine = engine_for(model, num_pages=16, page_size=4)
    input_ids = torch.tensor([prompt])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with EngineCache(engine, model, input_ids) as past:
            output = model.generate(input_ids, **{name: past}, max_new_tokens=4, do_sample=False)
        assert output[0, 12:].tolist() == stock_tokens(model, prompt, 4)
        longer = output[:, :15]
        with EngineCache(engine, model, longer) as past, torch.inference_mode():
            assert past.num_cached == 14
            logits = model(input_ids=longer[:, 14:], **{name: past}).logits
            assert past.lease.num_written == 15
        assert int(logits[0, -1].argmax()) == int(output[0, 15])
    assert_drains(engine)


def test_tokens_that_look_like_padding_are_read_and_hidden_tokens_are_refused():
    model = tiny()
    prompt = [5, 0, 0, 7, 8, 9]
    assert model.generation_config.pad_token_id == 0
    with torch.inference_mode():
        expected = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    engine = engine_for(model, num_pages=16, page_size=4)
    assert generate(model, engine, prompt, 1) == ([expected], 0)
    mask = torch.tensor([[1, 0, 0, 1, 1, 1]])
    with pytest.raises(InvalidArgument, match="attention_mask hides tokens"):
        generate(model, engine, prompt, 1, attention_mask=mask)
    assert_drains(engine)


MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
MLA |= {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "num_key_value_heads": 4,
    "head_dim": 8,
}

# Every entry: configuration class, model class, what differs from SIZES, what the error says.
OTHER_CACHES = {
    "kv-shared layers": (
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        {
            "num_kv_shared_layers": 1,
            "num_key_value_heads": 4,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8,
        }
        | {"laurel_rank": 8, "layer_types": ["full_attention"] * 3, "intermediate_size": [96] * 3}
        | {"activation_sparsity_pattern": [0.0] * 3},
        "0 times in layer 2",
    ),
    "heads repeated after the cache": (
        "JetMoeConfig",
        "JetMoeForCausalLM",
        {"kv_channels": 16, "num_local_experts": 4},
        "stores 2 heads with keys of 16",
    ),
    "linear attention": ("MiniMaxConfig", "MiniMaxForCausalLM", {"num_local_experts": 2}, "wants another cache"),
    "latent attention": ("DeepseekV3Config", "DeepseekV3ForCausalLM", MLA, "layer 0 of DeepseekV3ForCausalLM stores"),
}


@pytest.mark.parametrize("kind", OTHER_CACHES)
def test_what_a_model_would_store_is_checked_at_construction(kind):
    config_name, model_name, changes, message = OTHER_CACHES[kind]
    model = build(config_name, model_name, changes)
    engine = Engine(num_layers=3, num_qo_heads=4, num_kv_heads=4, head_dim=16, num_pages=8, dtype=torch.float32)
    with pytest.raises(InvalidArgument, match=message):
        EngineCache(engine, model, torch.tensor([[1, 2, 3]]))
    assert not model._forward_pre_hooks
    assert_drains(engine)


def test_a_generate_that_passes_everything_again_is_refused():
    """As Evolla's does: it would be written a second time, behind itself."""
    model = tiny()
    prompt = random_prompts(6)[0]
    engine = engine_for(model, num_pages=16, page_size=4)
    with (
        pytest.raises(InvalidArgument, match="given all 7 tokens again, 6 of which are written"),
        EngineCache(engine, model, torch.tensor([prompt])) as past,
        torch.inference_mode(),
    ):
        model(input_ids=torch.tensor([prompt]), **{NAME: past})
        model(input_ids=torch.tensor([[*prompt, 5]]), **{NAME: past})
    assert engine.cache.match(prompt) == 0
    assert_drains(engine)


def test_an_engine_of_another_dtype_or_depth_is_refused():
    sizes = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8}
    model = tiny()
    with pytest.raises(InvalidArgument, match=r"float32; the engine holds 2 heads of 16 and 16 in torch.bfloat16"):
        EngineCache(Engine(num_layers=3, dtype=torch.bfloat16, **sizes), model, torch.tensor([[1, 2]]))
    with pytest.raises(InvalidArgument, match="0 times in layer 3"):
        EngineCache(Engine(num_layers=4, dtype=torch.float32, **sizes), model, torch.tensor([[1, 2]]))
    with pytest.raises(InvalidArgument, match="each of the engine's 2 layers"):
        EngineCache(Engine(num_layers=2, dtype=torch.float32, **sizes), model, torch.tensor([[1, 2]]))


def test_placeholders_of_images_are_refused():
    model = vision_model()
    engine = engine_for(model, num_pages=16, page_size=4)
    prompt = [token for token in random_prompts(12)[0] if token != IMAGE]
    assert generate(model, engine, prompt, 3)[0] == stock_tokens(model, prompt, 3)
    with pytest.raises(InvalidTokens, match="stands for an image"):
        EngineCache(engine, model, torch.tensor([[1, IMAGE, 2]]))
    assert_drains(engine)


def test_prefill_in_chunks():
    model = tiny()
    prompt = random_prompts(27)[0]
    engine = engine_for(model, num_pages=32, page_size=4)
    assert generate(model, engine, prompt, 6, prefill_chunk_size=8) == (stock_tokens(model, prompt, 6), 0)
    assert_drains(engine)


def test_generator_and_engine_cache_share_pages():
    model = tiny()
    prompt = random_prompts(21)[0]
    engine = engine_for(model, num_pages=32, page_size=4)
    expected, _ = generate(model, engine, prompt, 8)
    with Generator(model, engine) as generator:
        request = generator.submit(prompt + expected, max_new_tokens=4)
        generator.run()
    assert request.stats.cached_tokens == len(prompt) + 7
    assert_drains(engine)


def test_other_tokens_than_promised_are_refused_and_nothing_is_published():
    model = tiny()
    one, other = random_prompts(12, 12)
    engine = engine_for(model, num_pages=16, page_size=4)
    with pytest.raises(InvalidTokens, match="same"), EngineCache(engine, model, torch.tensor([one])) as past:
        model.generate(torch.tensor([other]), **{NAME: past}, max_new_tokens=2, do_sample=False)
    assert engine.cache.match(one) == engine.cache.match(other) == 0
    assert_drains(engine)


def test_the_hook_is_removed_and_the_pool_may_run_out():
    model = tiny()
    prompt = random_prompts(12)[0]
    engine = engine_for(model, num_pages=4, page_size=4)
    with pytest.raises(PoolExhausted):
        generate(model, engine, prompt, 10)
    assert not model._forward_pre_hooks
    assert_drains(engine)


def test_batches_and_switched_models_are_refused():
    model = tiny()
    engine = engine_for(model, num_pages=8)
    with pytest.raises(InvalidArgument, match="one sequence"):
        EngineCache(engine, model, torch.ones((2, 3), dtype=torch.int64))
    Generator(model, engine)
    with pytest.raises(InvalidArgument, match="Generator"):
        EngineCache(engine, model, torch.ones((1, 3), dtype=torch.int64))
    assert_drains(engine)


def test_pages_of_8_bits_are_refused():
    """generate() would get the stored values without their scale."""
    model = tiny("llama")
    engine = engine_for(model, num_pages=8, kv_format="fp8")
    with pytest.raises(InvalidArgument, match="stores K and V as float8_e4m3fn"):
        EngineCache(engine, model, torch.tensor([[1, 2]]))
