"""What Generator and submit are given is checked when it is given, with the numbers; nothing is half submitted."""

import asyncio
import contextlib
import copy
import math
import pickle

import numpy as np
import pytest
import torch

from radixkv import Engine, InvalidArgument, InvalidTokens, LeaseError
from radixkv.hf import AsyncGenerator, Generator, engine_for
from tests.hf.helpers import VOCABULARY, stock_tokens, tiny

GEOMETRY = {"num_layers": 3, "num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8}


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture
def generator(model):
    with Generator(model, engine_for(model, num_pages=200, page_size=4)) as generator:
        yield generator


# --- submit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt", [[], [[1, 2]], [1, -1], [1, VOCABULARY], [1.5], [True], "text", None, [[1], [2, 3]], [2**70], object()]
)
def test_bad_prompts_are_refused(generator, prompt):
    with pytest.raises(InvalidTokens):
        generator.submit(prompt)
    assert not generator.step()


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("max_new_tokens", 0, "at least 1"),
        ("max_new_tokens", True, "whole number"),
        ("max_new_tokens", 2.0, "whole number"),
        ("max_new_tokens", 512, "exceed max_length 512"),
        ("n", 0, "at least 1"),
        ("n", "2", "whole number"),
        ("n", 10**9, "at most 4096"),
        ("content", None, "or a list with a mapping"),
        ("content", 5, "or a list with a mapping"),
        ("temperature", -0.1, "0 .greedy. or above"),
        ("temperature", math.nan, "finite"),
        ("temperature", math.inf, "finite"),
        pytest.param("temperature", 10**400, "number", id="temperature-huge"),
        ("temperature", "0.5", "number"),
        ("temperature", True, "number"),
        ("top_k", -1, "at least 0"),
        ("top_k", 1.5, "whole number"),
        ("top_p", 0, "above 0"),
        ("top_p", math.nan, "above 0"),
        ("min_p", 1.5, "0 .off. to 1"),
        ("repetition_penalty", 0, "above 0"),
        ("presence_penalty", math.nan, "finite"),
        ("frequency_penalty", "1", "number"),
        ("processors", len, "give a list of it"),
        ("processors", [5], "callable"),
        ("logprobs", -1, "at least 0"),
        ("stop_strings", ["a"], "tokenizer="),
        ("stop_strings", "a", "sequence of strings"),
        ("stop_strings", [""], "one character"),
        ("priority", 1, "policy='priority'"),
        ("deadline", 0, "above 0"),
        ("on_done", 5, "callable"),
        ("seed", None, "whole number"),
        ("seed", False, "whole number"),
        ("seed", 2**63, "at most 9223372036854775807"),
        ("stop_tokens", 2, r"\[2\]"),
        ("stop_tokens", "2", "sequence of token ids"),
        ("stop_tokens", [2.0], "whole number"),
        ("stop_tokens", [True], "whole number"),
        ("stop_tokens", [-1], "at least 0"),
        ("stop_tokens", [VOCABULARY], "at most 96"),
        ("namespace", None, "str"),
        ("namespace", 5, "str"),
        ("namespace", b"a", "str"),
        ("namespace", "a\ud800", "UTF-8"),
        ("on_token", "print", "callable"),
        ("on_logits", 5, "callable"),
    ],
)
def test_bad_options_are_refused_by_name_and_nothing_is_submitted(generator, option, value, remedy):
    name = "new tokens" if value == 512 else option
    with pytest.raises(InvalidArgument, match=f"{name}.*{remedy}"):
        generator.submit([1], **{"n": 3, option: value})
    assert not generator.step()


def test_a_coroutine_as_callback_is_refused(generator):
    async def on_token(request, token):
        pass

    with pytest.raises(InvalidArgument, match="coroutine"):
        generator.submit([1], on_token=on_token)


def test_the_last_of_n_seeds_is_checked_too(generator):
    assert generator.submit([1], seed=2**63 - 3, n=3, max_new_tokens=1)
    with pytest.raises(InvalidArgument, match="seed is 9223372036854775808"):
        generator.submit([1], seed=2**63 - 2, n=3)
    generator.run()


def test_numpy_and_torch_scalars_are_numbers(generator, model):
    request = generator.submit(
        np.array([5, 6, 7]),
        max_new_tokens=np.int64(6),
        temperature=np.float32(0),
        top_k=np.int32(3),
        top_p=np.float64(0.5),
        seed=torch.tensor(3),
        stop_tokens=np.array([0]),
        n=np.int8(1),
    )
    generator.run()
    expected = stock_tokens(model, [5, 6, 7], 6)
    model.set_attn_implementation("radixkv")
    assert request.tokens == expected[: expected.index(0) + 1 if 0 in expected else 6]
    assert type(request.max_new_tokens) is int


def test_stop_tokens_may_be_any_collection(generator):
    for stops in ({3, 4}, (3, 4), iter([3, 4]), torch.tensor([3, 4])):
        assert generator.submit([1], stop_tokens=stops).stop_tokens == frozenset({3, 4})


def test_a_refused_submission_leaves_the_others_alone(generator, model):
    expected = stock_tokens(model, [1, 2, 3], 4)
    request = generator.submit([1, 2, 3], max_new_tokens=4)
    with contextlib.suppress(InvalidArgument):
        generator.submit([1, 2, 3], namespace=5)
    generator.run()
    assert request.tokens == expected


def test_a_closed_engine_refuses_at_submit(model):
    engine = engine_for(model, num_pages=8)
    generator = Generator(model, engine)
    engine.close()
    with pytest.raises(LeaseError, match="closed"):
        generator.submit([1])
    assert not generator.step()


# --- Generator --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gpt2", None, torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(InvalidArgument, match=r"from_pretrained"):
        Generator(model)


def test_a_model_without_logits_is_refused(model):
    with pytest.raises(InvalidArgument, match="LlamaModel.*logits"):
        Generator(model.model, engine_for(model, num_pages=8))


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(InvalidArgument, match=r"model.eval\(\)"):
        Generator(tiny().train())


@pytest.mark.parametrize("engine", [5, "cpu", {}])
def test_what_is_no_engine_is_refused(model, engine):
    with pytest.raises(InvalidArgument, match="engine_for"):
        Generator(model, engine)


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        ({"num_layers": 2}, "num_layers 2, the model 3"),
        ({"num_qo_heads": 8}, r"layer 0 as LayerShape\(num_qo_heads=8, .*, the model LayerShape\(num_qo_heads=4"),
        ({"num_kv_heads": 4}, "num_kv_heads=4, .*, the model LayerShape.*num_kv_heads=2"),
        ({"head_dim": 64}, "k_dim=64, .*, the model LayerShape.*k_dim=16"),
        ({"dtype": torch.bfloat16}, "dtype torch.bfloat16, the model torch.float32"),
    ],
)
def test_an_engine_for_another_model_is_refused_with_the_numbers(change, numbers):
    model = tiny()
    engine = Engine(**{**GEOMETRY, "dtype": torch.float32, **change})
    with pytest.raises(InvalidArgument, match=rf"the engine has .*{numbers}.*engine_for\(model"):
        Generator(model, engine)
    assert model.config._attn_implementation == "eager", "a refused model is left as it was"


def test_an_engine_on_another_device_is_refused(model, monkeypatch):
    engine = engine_for(model, num_pages=8)
    monkeypatch.setattr(engine, "device", torch.device("cuda:0"))
    with pytest.raises(InvalidArgument, match="the engine has device cuda:0, the model cpu"):
        Generator(model, engine)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_step_tokens", 0),
        ("max_step_tokens", 2.5),
        ("max_step_tokens", True),
        ("max_running", 0),
        ("max_running", None),
        ("max_length", 0),
        ("max_length", "512"),
    ],
)
def test_limits_are_checked(model, option, value):
    with pytest.raises(InvalidArgument, match=option):
        Generator(model, engine_for(model, num_pages=4), **{option: value})


def test_every_running_request_needs_a_token_a_step(model):
    with pytest.raises(InvalidArgument, match="max_running is 8, max_step_tokens 4"):
        Generator(model, engine_for(model, num_pages=4), max_step_tokens=4, max_running=8)


def test_max_length_beyond_the_model_is_refused(model):
    with pytest.raises(InvalidArgument, match="max_length is 513: the model was built for 512"):
        Generator(model, engine_for(model, num_pages=4), max_length=513)


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_generators_are_neither_pickled_nor_copied(copied):
    model = tiny()
    with pytest.raises(TypeError, match="a Generator cannot be pickled or copied: it belongs to one thread"):
        copied(Generator(model, engine_for(model, num_pages=8)))

    async def of_asyncio():
        async with AsyncGenerator(model, engine_for(model, num_pages=8)) as generator:
            with pytest.raises(TypeError, match="an AsyncGenerator cannot be pickled or copied: it owns a thread"):
                copied(generator)

    asyncio.run(of_asyncio())
