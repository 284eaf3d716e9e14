"""EngineCache: transformers' own generate over the engine's pages."""

import pytest
import torch

from radixkv import InvalidArgument, InvalidTokens, PoolExhausted
from radixkv.hf import EngineCache, Generator, engine_for
from tests.hf_helpers import assert_drains, one_thread, random_prompts, stock_tokens, tiny


@pytest.fixture(autouse=True, scope="module")
def single_threaded():
    with one_thread():
        yield


def generate(model, engine, prompt, count, **options):
    """Greedy tokens through EngineCache, and how many prompt tokens were cached."""
    input_ids = torch.tensor([prompt])
    with EngineCache(engine, model, input_ids) as past:
        output = model.generate(input_ids, past_key_values=past, max_new_tokens=count, do_sample=False, **options)
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
        model.generate(torch.tensor([other]), past_key_values=past, max_new_tokens=2, do_sample=False)
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


def test_pages_of_8_bits_are_refused(monkeypatch):
    """generate() would get the stored values without their scale."""
    model = tiny("llama")
    with engine_for(model, num_pages=8) as engine:
        monkeypatch.setattr(engine, "kv_dtype", torch.float8_e4m3fn)
        with pytest.raises(InvalidArgument, match="stores K and V as torch.float8_e4m3fn"):
            EngineCache(engine, model, torch.tensor([[1, 2]]))
