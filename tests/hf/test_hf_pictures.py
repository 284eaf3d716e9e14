"""Pictures in prompts: the answers of stock transformers, one run of the vision tower a picture, no wrong hit."""

import re
from pathlib import Path
from unittest import mock

import pytest
import torch

from radixkv import InvalidArgument, InvalidTokens
from radixkv.hf import Generator, engine_for, optimize, pictures
from radixkv.hf.pictures import FAMILIES
from radixkv.scheduling import space
from tests.hf.helpers import IMAGE, assert_drains, random_prompts, tiny, vision_model
from tests.zoo import families
from tests.zoo.judge import stock as zoo_stock

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
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
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


PLACED = {"cohere_compass", "cosmos3_edge", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "paddleocr_vl"}
PLACED |= {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"}
"""Families that place the rows of a picture by time, height and width."""


def patches(model, seed, height, width):
    """A picture as the processors of these families make it, and its placeholders."""
    vision = model.config.vision_config
    channels = getattr(vision, "in_channels", None) or vision.num_channels
    sizes = [channels, getattr(vision, "temporal_patch_size", 1), vision.patch_size, vision.patch_size]
    pixels = torch.randn([height * width, *sizes], generator=torch.Generator().manual_seed(seed))
    pixels = pixels[:, :, 0] if model.config.model_type == "paddleocr_vl" else pixels.flatten(1)
    count = height * width // vision.spatial_merge_size**2
    given = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}
    return given, [model.config.image_token_id] * count


def placed_model(family, monkeypatch):
    if family == "qwen2_5_vl":  # windows of the tower of one patch after merging, at least
        monkeypatch.setitem(families.CHANGES, family, {**families.TEXT_MROPE, "vision_config": {"window_size": 64}})
    return families.build(family)


def served(model, engine, cases, **options):
    with Generator(model, engine, **options) as generator:
        requests = [
            generator.submit(prompt, content=given, max_new_tokens=8, stop_tokens=()) for prompt, given in cases
        ]
        generator.run()
    return [request.tokens for request in requests], requests


@pytest.mark.parametrize("family", sorted(PLACED))
def test_every_family_that_places_pictures_by_height_and_width_answers_as_stock(family, monkeypatch):
    """Cold and warm, in steps that end inside a picture, beside a request without one; and the positions matter."""
    model = placed_model(family, monkeypatch)
    (small, marks), (wide, more_marks) = patches(model, 1, 4, 4), patches(model, 2, 4, 8)
    system = list(range(3, 14))
    cases = [([*system, *marks, 30, 31], [small]), ([*system, *more_marks, 30, 31], [wide]), ([*system, 50, 51], [])]
    cases.append(([*system, *more_marks, 20, *marks, 30], [wide, small]))
    expected = [stock(model, prompt, given) if given else zoo_stock(model, prompt) for prompt, given in cases]
    engine = engine_for(model, num_pages=128, page_size=4)
    for _ in ("cold", "warm"):
        assert served(model, engine, cases, max_step_tokens=13, max_running=8)[0] == expected
    engine.cache.clear()
    monkeypatch.setattr(pictures, "_positions", lambda *arguments: None)
    assert served(model, engine, cases)[0] != expected


def test_eight_requests_over_two_pictures_of_one_size_and_a_turned_one(monkeypatch):
    """Qwen3-VL, whose features are also added between layers; tight enough that requests are preempted."""
    model, seen = placed_model("qwen3_vl", monkeypatch), []
    model.model.visual.register_forward_hook(lambda *_: seen.append(1))
    (one, marks), (other, _) = patches(model, 1, 4, 8), patches(model, 2, 4, 8)
    turned = {**one, "image_grid_thw": torch.tensor([[1, 8, 4]])}
    cases = [([3, 4, 5, *marks, *range(6 + i, 15 + i)], [[one, other][i % 2]]) for i in range(8)]
    expected = [stock(model, prompt, given) for prompt, given in cases]
    engine = engine_for(model, num_pages=128, page_size=4)
    for towers in (2, 0):
        seen.clear()
        tokens, requests = served(model, engine, cases, max_running=8)
        assert tokens == expected
        assert len(seen) == towers
    assert [request.stats.cached_tokens for request in requests] == [len(prompt) - 1 for prompt, _ in cases]
    tokens, (request,) = served(model, engine, [(cases[0][0], [turned])])
    assert tokens == [stock(model, cases[0][0], [turned])] != expected[:1]
    assert request.stats.cached_tokens == 3
    tight = engine_for(model, num_pages=15, page_size=4)
    with mock.patch.object(space, "HEADROOM", 0):
        tokens, requests = served(model, tight, cases, max_running=8)
    assert tokens == expected
    assert sum(request.stats.preemptions for request in requests) > 0
    assert_drains(tight)


def test_an_optimized_model_takes_pictures_as_well(monkeypatch):
    model = placed_model("qwen2_vl", monkeypatch)
    given, marks = patches(model, 1, 4, 8)
    prompt = [3, 4, *marks, 5, 6]
    expected = stock(model, prompt, [given])
    optimize(model)
    assert served(model, engine_for(model, num_pages=32, page_size=4), [(prompt, [given])])[0] == [expected]


@pytest.mark.parametrize("family", sorted(FAMILIES - PLACED))
def test_every_family_that_takes_pictures_answers_as_stock(family, monkeypatch):
    larger = {**families.CHANGES.get(family, {}), "vision_config": {"image_size": 64}}
    monkeypatch.setitem(families.CHANGES, family, larger)
    model = families.build(family)
    shown, dim = [picture(1, 64), picture(2, 64)], 0
    if family in ("idefics3", "smolvlm"):  # several pictures of one prompt in a dimension of their own
        shown, dim = [{"pixel_values": given["pixel_values"][:, None]} for given in shown], 1
    with torch.inference_mode():
        found = model.get_image_features(**shown[0], return_dict=True).pooler_output
    marks = [model.config.image_token_id] * sum(len(rows) for rows in found)
    assert len(marks) >= 4, "rows of one picture must be able to see each other"
    system = list(range(3, 14))
    cases = [([*system, *marks, 30, 31], shown[:1]), ([*system, *marks, 30, 31], shown[1:])]
    cases.append(([*system, *marks, 20, *marks, 30], shown))
    expected = [stock(model, prompt, given, dim) for prompt, given in cases]
    assert expected[0] != expected[1]
    engine = engine_for(model, num_pages=128, page_size=4)
    for _ in ("cold", "warm"):
        assert served(model, engine, cases, max_step_tokens=13, max_running=8)[0] == expected


@pytest.mark.parametrize(
    ("prompt", "content", "error", "message"),
    [
        ([1, IMAGE, 2], [picture(1), picture(2)], InvalidTokens, "has 1 runs of token 90, and content has 2 pictures"),
        ([1, 2], [picture(1)], InvalidTokens, "has 0 runs"),
        (
            [1, IMAGE, 2],
            [torch.zeros(3)],
            InvalidArgument,
            "or a list with a mapping for each run .* got a list with Tensor",
        ),
        (
            [1, IMAGE, 2],
            [{"pixel_values": [1.0]}],
            InvalidArgument,
            "'pixel_values' in content is a list: .* return_tensors='pt'",
        ),
        ([1, IMAGE, 2], [], InvalidTokens, "token 90 at position 1 stands for an image"),
    ],
)
def test_content_that_does_not_fit_the_prompt(prompt, content, error, message):
    model = vision_model()
    with Generator(model, engine_for(model, num_pages=8)) as generator, pytest.raises(error, match=message):
        generator.submit(prompt, content=content)


def test_the_docs_name_every_family_that_takes_pictures():
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    named = text[text.index("**Pictures**") : text.index("each with equal")]
    assert set(re.findall(r"`([a-z0-9_]+)`", named)) == FAMILIES


def test_a_family_that_was_not_tried_is_refused():
    model = tiny()
    with (
        Generator(model, engine_for(model, num_pages=8)) as generator,
        pytest.raises(InvalidArgument, match="LlamaForCausalLM cannot be given content: .* aya_vision, .*text alone"),
    ):
        generator.submit([1, 2], content=[picture(1)])


def test_pictures_whose_rows_see_each_other_are_refused_with_the_reason():
    model = families.build("gemma3")
    with (
        Generator(model, engine_for(model, num_pages=8)) as generator,
        pytest.raises(InvalidArgument, match="Gemma3.* the rows of a picture see the rows after them"),
    ):
        generator.submit([1, 2], content=[picture(1)])


def test_sizes_of_pictures_that_are_missing_or_do_not_fit(monkeypatch):
    model = placed_model("qwen2_vl", monkeypatch)
    given, marks = patches(model, 1, 4, 4)
    with Generator(model, engine_for(model, num_pages=8)) as generator:
        with pytest.raises(InvalidArgument, match="places a picture by its size: give 'image_grid_thw'"):
            generator.submit([3, *marks, 4], content=[{"pixel_values": given["pixel_values"]}])
        with pytest.raises(InvalidTokens, match=r"do not fit pictures of image_grid_thw \[\[1, 4, 4\]\]"):
            generator.submit([3, *marks[1:], 4], content=[given])


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
