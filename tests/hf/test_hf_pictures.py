"""Pictures in prompts: the answers of stock transformers, one run of the vision tower a picture, no wrong hit."""

from unittest import mock

import pytest
import torch

from radixkv import InvalidArgument, InvalidTokens
from radixkv.hf import Generator, engine_for
from radixkv.hf.pictures import FAMILIES
from radixkv.scheduling import space
from tests.hf.helpers import IMAGE, assert_drains, random_prompts, tiny, vision_model
from tests.zoo import families

COUNT = 4
"""Placeholders for a picture of `vision_model`: four patches."""


def picture(seed, size=16):
    return {"pixel_values": torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed))}


def text(length, seed):
    return [token for token in random_prompts(length, seed=seed)[0] if token != IMAGE]


def stock(model, prompt, pictures, dim=0):
    """Greedy tokens of transformers' own generate."""
    ids = torch.tensor([prompt])
    inputs = {name: torch.cat([given[name] for given in pictures], dim) for name in pictures[0]}
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, **inputs)
    model.set_attn_implementation(before)
    return output[0, len(prompt) :].tolist()


@pytest.fixture
def counted():
    """A model, and a list that grows by one with every picture that its vision tower sees."""
    model, seen = vision_model(), []
    model.model.vision_tower.register_forward_hook(lambda _, args, kwargs, out: seen.append(1), with_kwargs=True)
    return model, seen


@pytest.mark.parametrize("max_step_tokens", [9, 2048])
def test_eight_requests_over_two_pictures(counted, max_step_tokens):
    """Cold, warm, and cut into steps that end inside a picture."""
    model, seen = counted
    pictures = [picture(1), picture(2)]
    system = text(11, seed=1)
    prompts = [[*system, *[IMAGE] * COUNT, *text(4 + i, seed=i)] for i in range(8)]
    expected = [stock(model, prompt, [pictures[i % 2]]) for i, prompt in enumerate(prompts)]
    assert len({tuple(tokens) for tokens in expected}) > 6
    engine = engine_for(model, num_pages=128, page_size=4)
    with Generator(model, engine, max_step_tokens=max_step_tokens, max_running=8) as generator:
        for towers in (2, 0):
            seen.clear()
            requests = [
                generator.submit(prompt, content=[pictures[i % 2]], max_new_tokens=8)
                for i, prompt in enumerate(prompts)
            ]
            generator.run()
            assert [request.tokens for request in requests] == expected
            assert len(seen) == towers
        assert [request.stats.cached_tokens for request in requests] == [len(prompt) - 1 for prompt in prompts]
    assert all(request.spans == () for request in requests), "features are let go"
    assert_drains(engine)


def test_requests_that_are_preempted_and_begin_again(counted):
    model, seen = counted
    pictures = [picture(1), picture(2)]
    prompts = [[*text(6, seed=i), *[IMAGE] * COUNT, *text(9, seed=i)] for i in range(6)]
    expected = [stock(model, prompt, [pictures[i % 2]]) for i, prompt in enumerate(prompts)]
    engine = engine_for(model, num_pages=13, page_size=4)
    seen.clear()
    with (
        mock.patch.object(space, "HEADROOM", 0),
        Generator(model, engine, max_step_tokens=64, max_running=6) as generator,
    ):
        requests = [
            generator.submit(prompt, content=[pictures[i % 2]], max_new_tokens=8) for i, prompt in enumerate(prompts)
        ]
        generator.run()
    assert [request.tokens for request in requests] == expected
    assert sum(request.stats.preemptions for request in requests) > 0
    assert len(seen) == 2
    assert_drains(engine)


def test_a_picture_that_is_cached_is_found_and_another_is_not():
    model = vision_model()
    prompt = [5, 6, 7, *[IMAGE] * COUNT, 8, 9]
    engine = engine_for(model, num_pages=32, page_size=4)
    with Generator(model, engine) as generator:
        cached = []
        for given in (picture(1), picture(1), picture(2), picture(1)):
            request = generator.submit(prompt, content=[given], max_new_tokens=2)
            generator.run()
            cached.append(request.stats.cached_tokens)
            assert request.tokens == stock(model, prompt, [given])[:2]
    assert cached == [0, len(prompt) - 1, 3, len(prompt) - 1]


def test_siblings_penalties_and_two_pictures_in_one_prompt():
    model = vision_model()
    prompt = [*[IMAGE] * COUNT, 5, *[IMAGE] * COUNT, 6, 7]
    pictures = [picture(1), picture(2)]
    expected = stock(model, prompt, pictures)
    assert expected != stock(model, prompt, pictures[::-1])
    engine = engine_for(model, num_pages=64, page_size=4)
    with Generator(model, engine) as generator:
        first = generator.submit(prompt, content=pictures, max_new_tokens=8, n=2)
        generator.submit(prompt, content=pictures, max_new_tokens=8, repetition_penalty=1.3)
        generator.run()
    assert [request.tokens for request in first.siblings] == [expected, expected]
    assert_drains(engine)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_that_takes_pictures_answers_as_stock(family, monkeypatch):
    larger = {**families.CHANGES.get(family, {}), "vision_config": {"image_size": 64}}
    monkeypatch.setitem(families.CHANGES, family, larger)
    model = families.build(family)
    pictures, dim = [picture(1, 64), picture(2, 64)], 0
    if family in ("idefics3", "smolvlm"):  # several pictures of one prompt in a dimension of their own
        pictures, dim = [{"pixel_values": given["pixel_values"][:, None]} for given in pictures], 1
    with torch.inference_mode():
        found = model.get_image_features(**pictures[0], return_dict=True).pooler_output
    marks = [model.config.image_token_id] * sum(len(rows) for rows in found)
    assert len(marks) >= 4, "rows of one picture must be able to see each other"
    system = list(range(3, 14))
    cases = [([*system, *marks, 30, 31], pictures[:1]), ([*system, *marks, 30, 31], pictures[1:])]
    cases.append(([*system, *marks, 20, *marks, 30], pictures))
    expected = [stock(model, prompt, given, dim) for prompt, given in cases]
    assert expected[0] != expected[1]
    engine = engine_for(model, num_pages=128, page_size=4)
    with Generator(model, engine, max_step_tokens=13, max_running=8) as generator:
        for _ in ("cold", "warm"):
            requests = [
                generator.submit(prompt, content=given, max_new_tokens=8, stop_tokens=()) for prompt, given in cases
            ]
            generator.run()
            assert [request.tokens for request in requests] == expected


@pytest.mark.parametrize(
    ("prompt", "content", "error", "message"),
    [
        ([1, IMAGE, 2], [picture(1), picture(2)], InvalidTokens, "has 1 runs of token 90, and content has 2 pictures"),
        ([1, 2], [picture(1)], InvalidTokens, "has 0 runs"),
        ([1, IMAGE, 2], [torch.zeros(3)], InvalidArgument, "content is a list with a mapping .* got Tensor"),
        ([1, IMAGE, 2], [{"pixel_values": [1.0]}], InvalidArgument, "content is a list with a mapping"),
        ([1, IMAGE, 2], [], InvalidTokens, "token 90 at position 1 stands for an image"),
    ],
)
def test_content_that_does_not_fit_the_prompt(prompt, content, error, message):
    model = vision_model()
    with Generator(model, engine_for(model, num_pages=8)) as generator, pytest.raises(error, match=message):
        generator.submit(prompt, content=content)


def test_a_family_that_was_not_tried_is_refused():
    model = tiny()
    with (
        Generator(model, engine_for(model, num_pages=8)) as generator,
        pytest.raises(InvalidArgument, match="LlamaForCausalLM cannot be given content: .* aya_vision, .*text alone"),
    ):
        generator.submit([1, 2], content=[picture(1)])


def test_a_picture_of_another_size_than_its_placeholders_ends_its_own_request():
    model = vision_model()
    engine = engine_for(model, num_pages=32, page_size=4)
    good = [5, *[IMAGE] * COUNT, 6]
    with Generator(model, engine) as generator:
        wrong = generator.submit([5, IMAGE, IMAGE, 6], content=[picture(1)])
        also_wrong = generator.submit([7, IMAGE, 6], content=[picture(2)])
        right = generator.submit(good, content=[picture(2)], max_new_tokens=8)
        with pytest.raises(InvalidTokens, match="2 placeholders for a picture of which the model makes 4 rows"):
            generator.run()
    assert wrong.status == also_wrong.status == "error"
    assert right.tokens == stock(model, good, [picture(2)])
    assert_drains(engine)
