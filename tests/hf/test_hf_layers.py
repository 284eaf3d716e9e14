"""Layers that need more than q, k, v and a window: sinks, chunks, K and V of another layer, positions of their own."""

import pytest
import torch

from radixkv import InvalidArgument
from radixkv.hf import Generator, engine_for, forward
from radixkv.hf.adapter import probe
from radixkv.hf.config import attention_chunks, stored_layers
from radixkv.shape import LayerShape
from tests.hf.helpers import assert_drains, build, random_prompts, stock_tokens, tiny

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LLAMA4 = {
    **EXPERTS,
    "num_hidden_layers": 4,
    "intermediate_size_mlp": 96,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 8,
    "no_rope_layers": [1, 1, 1, 0],
    "floor_scale": 6,
}


def gpt_oss(sink=2.0):
    model = build("GptOssConfig", "GptOssForCausalLM", {**EXPERTS, "sliding_window": 8})
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.sinks.copy_(torch.arange(4) * sink - index)
    return model


def llama4(**changes):
    return build("Llama4TextConfig", "Llama4ForCausalLM", LLAMA4 | changes)


def assert_answers_as_stock(model, engine):
    """Cold, warm, and in the company of requests that share a beginning."""
    prompts = random_prompts(33, 1, 18, 5)
    prompts.append(prompts[0][:21] + prompts[2])
    expected = [stock_tokens(model, prompt, 12) for prompt in prompts]
    with Generator(model, engine) as generator:
        for _ in ("cold", "warm"):
            requests = [generator.submit(prompt, max_new_tokens=12) for prompt in prompts]
            generator.run()
            assert [request.tokens for request in requests] == expected
    assert requests[0].stats.cached_tokens >= 32
    assert_drains(engine)


def last_logits(model, engine, prompt, cached=0):
    """Of the prompt's last token, on the empty engine, with its first `cached` tokens computed before."""
    engine.cache.clear()
    with torch.inference_mode():
        if cached:
            with engine.acquire(prompt[:cached]) as lease, engine.step([lease]) as step:
                forward(model, step)
        with engine.acquire(prompt) as lease, engine.step([lease]) as step:
            assert lease.num_cached == cached
            return forward(model, step)[0]


# --- sinks -----------------------------------------------------------------------------------------------------------


def test_sinks_over_windows_and_all_keys():
    model = gpt_oss()
    assert_answers_as_stock(model, engine_for(model, num_pages=128, page_size=4))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str)
def test_sinks_change_the_logits_as_stock_changes_them(dtype, tolerance):
    model = gpt_oss().to(dtype)
    (prompt,) = random_prompts(30)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0, -1]
    engine = engine_for(model, num_pages=32, page_size=4)
    for cached in (0, 20):
        torch.testing.assert_close(last_logits(model, engine, prompt, cached), expected, rtol=0, atol=tolerance)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(-100.0)
    assert (last_logits(model, engine, prompt) - expected).abs().max() > 5 * tolerance, "the sinks must matter"


# --- K and V of another layer --------------------------------------------------------------------------------------


def test_layers_that_share_k_and_v_are_stored_once():
    model = tiny("gemma3n-shared-kv")
    assert stored_layers(model.config) == [0, 1, 0, 1]
    engine = engine_for(model, num_pages=128, page_size=4)
    assert engine.layers == (LayerShape(4, 2, 16),) * 2
    assert engine.pool.nbytes == 2 * 128 * 4 * 2 * 2 * 16 * 4  # layers, pages, tokens, K and V, heads, dim, bytes
    assert_answers_as_stock(model, engine)


def test_every_layer_of_a_plain_model_is_stored():
    assert stored_layers(tiny().config) is None
    assert attention_chunks(tiny().config) is None


def test_a_layer_that_says_it_shares_and_does_not_is_refused():
    model = tiny("gemma3n-shared-kv")
    attention = model.model.layers[3].self_attn
    attention.layer_type = "sliding_attention"  # and takes what it attends to from there
    with pytest.raises(InvalidArgument, match="layer 3 shares the K and V of an earlier layer .* attends to others"):
        engine_for(model, num_pages=8)


# --- chunks, and positions counted from the cache ---------------------------------------------------------------------


def test_chunks_alternate_with_layers_that_see_all():
    model = llama4()
    assert attention_chunks(model.config) == [8, 8, 8, 0]
    assert_answers_as_stock(model, engine_for(model, num_pages=128, page_size=4))


@pytest.mark.parametrize("cached", [0, 3, 8, 20, 25])
def test_chunks_give_the_logits_of_stock_wherever_a_prompt_is_cut(cached):
    model = llama4()
    (prompt,) = random_prompts(29)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0, -1]
    found = last_logits(model, engine_for(model, num_pages=32, page_size=4), prompt, cached)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_chunks_and_scaled_queries_matter_to_these_models():
    (prompt,) = random_prompts(29)
    logits = []
    for changes in ({}, {"attention_chunk_size": 64}, {"attn_temperature_tuning": False}):
        with torch.inference_mode():
            logits.append(llama4(**changes)(torch.tensor([prompt])).logits[0, -1])
    assert (logits[0] - logits[1]).abs().max() > 1e-2
    assert (logits[0] - logits[2]).abs().max() > 1e-2


def test_a_model_whose_every_layer_has_chunks_drops_pages_as_with_a_window():
    assert probe(llama4()).window_left == -1
    assert probe(llama4(no_rope_layers=[1, 1, 1, 1])).window_left == 7
