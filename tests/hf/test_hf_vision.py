"""Pictures as users have them: images of Pillow, through each family's own processor, as `content`."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from radixkv import InvalidArgument, InvalidTokens
from radixkv.hf import Generator, engine_for
from radixkv.hf.pictures import FAMILIES
from tests.hf.helpers import assert_drains, transformers
from tests.zoo import families

pytest.importorskip("PIL", reason="the processors of transformers need Pillow")

from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

SIDE = 64
"""Of a picture, or of a tile of one, where the vision part takes one size only."""


@dataclass(frozen=True)
class Family:
    """How a family's processor is made, small."""

    processor: str
    images: str
    """Class of the image processor."""
    sizes: dict[str, Any]
    """Of the image processor; none: patches, as the model's configuration has them."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the processor."""
    names: dict[str, str] = field(default_factory=dict)
    """Special tokens that it asks the tokenizer for, by attribute."""
    marks: str = ""
    """Other special tokens."""
    image: str = "<image>"
    """The placeholder."""
    picture: str = "<image>"
    """What a prompt has for a picture."""
    tower: str = "visual"


def grid(processor: str, images: str, begin: str, image: str, end: str, marks: str = "", **more: Any) -> Family:
    """A family that cuts a picture into patches, and places them by height and width."""
    marks = f"{begin} {end} {marks}"
    return Family(processor, images, {}, marks=marks, image=image, picture=begin + image + end, **more)


def qwen(processor: str, images: str = "Qwen2VLImageProcessorPil") -> Family:
    return grid(processor, images, "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")


def glm(processor: str, images: str) -> Family:
    marks = "<|video|> <|begin_of_video|> <|end_of_video|>"
    return grid(processor, images, "<|begin_of_image|>", "<|image|>", "<|end_of_image|>", marks)


def idefics(processor: str, images: str, **options: Any) -> Family:
    sizes = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    marks = " ".join(["<fake_token_around_image> <global-img> <end_of_utterance> <video>", *tiles])
    return Family(processor, images, sizes, {"image_seq_len": 4, **options}, marks=marks, tower="vision_model")


def internvl(processor: str, picture: str) -> Family:
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    names["video_token"] = "<video>"
    options, image = {"image_seq_length": 4}, names["context_image_token"]
    return Family(processor, "GotOcr2ImageProcessorPil", TILES, options, names, "", image, picture, "vision_tower")


TILES = {"size": {"height": SIDE, "width": SIDE}, "max_patches": 2}
PROCESSORS = {
    "aya_vision": Family(
        "AyaVisionProcessor",
        "GotOcr2ImageProcessorPil",
        TILES,
        {"patch_size": 16, "img_size": SIDE, "downsample_factor": 2},
        marks="<|START_OF_IMG|> <|END_OF_IMG|> TILE_1 TILE_2 TILE_GLOBAL",
        image="<|IMG_PATCH|>",
        tower="vision_tower",
    ),
    "cohere2_vision": Family(
        "Cohere2VisionProcessor",
        "Cohere2VisionImageProcessor",
        {**TILES, "patch_size": 2},
        names={
            "image_token": "<image>",
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
        tower="vision_tower",
    ),
    "cohere_compass": grid(
        "CohereCompassProcessor",
        "CohereCompassImageProcessorPil",
        "<|VISION_START|>",
        "<|IMAGE_PAD|>",
        "<|VISION_END|>",
        "<|VIDEO_PAD|>",
    ),
    "cosmos3_edge": qwen("Cosmos3EdgeProcessor", "Cosmos3EdgeImageProcessorPil"),
    "glm46v": glm("Glm46VProcessor", "Glm46VImageProcessorPil"),
    "glm4v": glm("Glm4vProcessor", "Glm4vImageProcessorPil"),
    "glm4v_moe": glm("Glm4vProcessor", "Glm4vImageProcessorPil"),
    "glm_ocr": glm("Glm46VProcessor", "Glm46VImageProcessorPil"),
    "idefics3": idefics("Idefics3Processor", "Idefics3ImageProcessorPil"),
    "internvl": internvl("InternVLProcessor", "<IMG_CONTEXT>"),
    "llava": Family(
        "LlavaProcessor",
        "CLIPImageProcessorPil",
        {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}},
        {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        tower="vision_tower",
    ),
    "paddleocr_vl": grid(
        "PaddleOCRVLProcessor",
        "PaddleOCRVLImageProcessorPil",
        "<|IMAGE_START|>",
        "<|IMAGE_PLACEHOLDER|>",
        "<|IMAGE_END|>",
        names={"image_token": "<|IMAGE_PLACEHOLDER|>"},
    ),
    "qianfan_ocr": internvl("QianfanOCRProcessor", "<image>"),
    "qwen2_5_vl": qwen("Qwen2_5_VLProcessor"),
    "qwen2_vl": qwen("Qwen2VLProcessor"),
    "qwen3_vl": qwen("Qwen3VLProcessor"),
    "qwen3_vl_moe": qwen("Qwen3VLProcessor"),
    "smolvlm": idefics("SmolVLMProcessor", "SmolVLMImageProcessorPil", video_processor=None),
}


def test_every_family_that_takes_pictures_has_its_processor_here():
    assert set(PROCESSORS) == FAMILIES


@pytest.fixture(autouse=True)
def no_videos(monkeypatch):
    """Processors may be made without their part for videos, which needs torchvision."""
    mixin = transformers.ProcessorMixin
    check = mixin.check_argument_for_proper_class

    def without_videos(self, name, argument):
        return None if name == "video_processor" else check(self, name, argument)

    monkeypatch.setattr(mixin, "check_argument_for_proper_class", without_videos)
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", str)  # how long a video is


def build(name, monkeypatch):
    """The zoo's tiny model of a family, with a vision part that makes several rows of a picture."""
    vision = {} if not PROCESSORS[name].sizes else {"image_size": SIDE}
    if name == "qwen2_5_vl":
        vision = {"window_size": SIDE}
    monkeypatch.setitem(families.CHANGES, name, {**families.CHANGES.get(name, {}), "vision_config": vision})
    return families.build(name)


def tokenizer_for(family, model):
    """Reads "w5 w6" as 5 and 6, and each special token as one, the placeholder as the model does."""
    words = {f"w{i}": i for i in range(families.WORDS)}
    special = dict.fromkeys([*family.names.values(), *family.marks.split()])
    special.pop(family.image, None)
    taken = {model.config.image_token_id, getattr(model.config, "video_token_id", None)}
    free = (i for i in range(families.WORDS, families.VOCABULARY) if i not in taken)
    vocabulary = {**words, family.image: model.config.image_token_id, **dict(zip(special, free, strict=False))}
    reader = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    reader.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    reader.add_special_tokens([family.image, *special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=reader, unk_token="w0", pad_token="w0", extra_special_tokens=family.names
    )


def processor_for(name, model):
    family, vision = PROCESSORS[name], model.config.vision_config
    if not family.images.endswith("Pil"):
        pytest.importorskip("torchvision", reason=f"{family.images} needs torchvision, and there is none for Pillow")
    sizes = family.sizes or {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": getattr(vision, "temporal_patch_size", 1),
        "size": {"shortest_edge": 32 * 32, "longest_edge": 128 * 128},
    }
    images = getattr(transformers, family.images)(**sizes)
    tokenizer = tokenizer_for(family, model)
    return getattr(transformers, family.processor)(image_processor=images, tokenizer=tokenizer, **family.options)


def picture(seed, width=SIDE, height=SIDE):
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def words(*numbers):
    return " ".join(f"w{number}" for number in numbers)


def stock(model, inputs):
    """Greedy tokens of transformers' own generate."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    model.set_attn_implementation(before)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def served(model, engine, cases, **options):
    with Generator(model, engine, **options) as generator:
        requests = [
            generator.submit(inputs["input_ids"][0], content=inputs, max_new_tokens=8, stop_tokens=())
            for inputs in cases
        ]
        generator.run()
    return [request.tokens for request in requests], [request.stats.cached_tokens for request in requests]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in the processors of GLM
@pytest.mark.parametrize("name", sorted(PROCESSORS))
def test_eight_requests_over_two_pictures(name, monkeypatch):
    """Cold and warm, in steps that end inside a picture; a third picture; and two in one prompt."""
    model, seen = build(name, monkeypatch), []
    family, processor = PROCESSORS[name], processor_for(name, model)
    getattr(model.model, family.tower).register_forward_hook(lambda *_: seen.append(1))

    more = {"return_mm_token_type_ids": True} if name == "cosmos3_edge" else {}  # stock needs them

    def asked(shown, ask):
        text = " ".join([words(*range(3, 14)), *[family.picture] * len(shown), ask])
        return processor(images=shown, text=text, return_tensors="pt", **more)

    shown = [picture(1), picture(2, width=2 * SIDE)]
    cases = [asked([shown[i % 2]], words(*range(20 + i, 25 + 2 * i))) for i in range(8)]
    expected = [stock(model, inputs) for inputs in cases]
    assert len({tuple(tokens) for tokens in expected}) > 6
    engine = engine_for(model, num_pages=512, page_size=4)
    placeholders = [(inputs["input_ids"][0] == model.config.image_token_id).int() for inputs in cases]
    runs = [int((marked.diff() == 1).sum()) for marked in placeholders]
    for towers in (runs[0] + runs[1], 0):
        seen.clear()
        tokens, cached = served(model, engine, cases, max_step_tokens=13, max_running=8)
        assert tokens == expected
        assert len(seen) == towers
    assert cached == [inputs["input_ids"].shape[1] - 1 for inputs in cases]

    other = asked([picture(3)], words(*range(20, 25)))
    assert served(model, engine, [other]) == ([stock(model, other)], [int(placeholders[0].argmax())])
    both = asked(shown, words(30, 31))
    assert served(model, engine, [both])[0] == [stock(model, both)]
    assert_drains(engine)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_prompt_without_pictures(name, monkeypatch):
    model = build(name, monkeypatch)
    inputs = processor_for(name, model)(text=words(5, 6, 7), return_tensors="pt")
    engine = engine_for(model, num_pages=16, page_size=4)
    assert served(model, engine, [inputs])[0] == [stock(model, inputs)]


@pytest.fixture(params=["llava", "qwen2_vl"])
def made(request, monkeypatch):
    """A generator, and what the processor made of a prompt of two pictures."""
    name = request.param
    model = build(name, monkeypatch)
    text = f"w5 {PROCESSORS[name].picture} w6 {PROCESSORS[name].picture} w7"
    inputs = processor_for(name, model)(images=[picture(1), picture(2)], text=text, return_tensors="pt")
    with Generator(model, engine_for(model, num_pages=64, page_size=4)) as generator:
        yield generator, inputs


def test_a_prompt_that_was_cut(made):
    generator, inputs = made
    ids = inputs["input_ids"][0].tolist()
    at = ids.index(generator.model.config.image_token_id)
    with pytest.raises(InvalidTokens, match=r"runs of \[\d+, \d+\] placeholders do not divide"):
        generator.submit(ids[:at] + ids[at + 1 :], content=inputs)
    moved = [*ids[: at + 1], *ids[at:]]
    del moved[len(ids) - ids[::-1].index(generator.model.config.image_token_id)]
    with pytest.raises(
        InvalidTokens, match=r"do not divide|end after \[20, 32\] patches, pictures of .* after \[16, 32\]"
    ):
        generator.submit(moved, content=inputs)
    with pytest.raises(InvalidTokens, match="has 0 runs of token"):
        generator.submit([5, 6], content=inputs)
    with pytest.raises(InvalidTokens, match="has 2 runs of token .* content has 0 pictures"):
        generator.submit(ids, content={"input_ids": inputs["input_ids"]})
    assert not generator.unfinished


def test_what_a_processor_made_of_several_prompts_or_without_tensors(made):
    generator, inputs = made
    ids = inputs["input_ids"]
    with pytest.raises(InvalidArgument, match="made of 2 prompts: call the processor for each"):
        generator.submit(ids[0], content={**inputs, "input_ids": ids.repeat(2, 1)})
    with pytest.raises(InvalidArgument, match="'pixel_values' in content is a ndarray: .* return_tensors='pt'"):
        generator.submit(ids[0], content={**inputs, "pixel_values": inputs["pixel_values"].numpy()})
