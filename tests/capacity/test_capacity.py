"""Sizes of KV caches against published figures, and against transformers' own reading of configurations."""

from __future__ import annotations

import itertools
import json
import struct

import pytest

from radixkv.capacity import (
    FORMATS,
    Layer,
    Model,
    bytes_per_page,
    bytes_per_request,
    bytes_per_token,
    fit,
    format_bytes,
    known_models,
    model_from_config,
    need_for,
    paging_waste,
    preallocation_waste,
    read_model,
)
from radixkv.errors import InvalidArgument, ModelNotFound
from radixkv.formats import LayerFormat, RowFormat
from radixkv.shape import LayerShape
from radixkv.traces.curve import capacity_curve
from radixkv.traces.replay import replay
from radixkv.traces.workload import generate

KIB, MIB, GIB = 2**10, 2**20, 2**30
BF16 = FORMATS["bf16"]


def llama(layers, heads, kv_heads, dim=128, **more):
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return {**sizes, "hidden_size": heads * dim, **more}


@pytest.mark.parametrize(
    ("name", "token", "of_4096"),
    [
        ("llama-3-8b", 131_072, 512 * MIB),
        ("llama-3-70b", 327_680, 1.25 * GIB),
        ("qwen2-72b", 327_680, 1.25 * GIB),
        ("llama-2-70b", 327_680, 1.25 * GIB),
        ("llama-2-7b", 524_288, 2 * GIB),
        ("llama-2-13b", 819_200, 3.125 * GIB),
        ("deepseek-v3", 70_272, 274.5 * MIB),
        ("smollm2-135m", 23_040, 90 * MIB),
    ],
)
def test_published_figures(name, token, of_4096):
    model = read_model(name)
    assert bytes_per_token(model, BF16) == token
    assert bytes_per_request(model, BF16, 4096) == of_4096
    assert bytes_per_page(model, BF16, 16) == 16 * token


def test_further_published_figures():
    seventy, seven = read_model("llama-3-70b"), read_model("llama-2-7b")
    assert bytes_per_request(seventy, BF16, 128 * KIB) == 40 * GIB
    assert bytes_per_request(seventy, BF16, 10_000) == 3_276_800_000
    assert bytes_per_request(seven, BF16, 2048) == 1 * GIB
    assert [bytes_per_request(seven, BF16, n * KIB) / GIB for n in (8, 32, 128)] == [4, 16, 64]
    wide = model_from_config(llama(96, 64, 8), "96 layers")
    assert bytes_per_token(wide, BF16) == 393_216
    assert bytes_per_request(wide, BF16, 10_000) == 3_932_160_000


def test_mqa_is_smaller_than_mla_by_layer():
    mqa, mla = Layer(32, 1, 128, 128), Layer(128, 1, 576, 0)
    assert (mqa.kind, mla.kind) == ("MQA", "MLA")
    sizes = [bytes_per_token(Model("one layer", (layer,)), BF16) // 2 for layer in (mqa, mla)]
    assert sizes == [2 * 128, 576]


def test_kinds():
    kinds = {name: model.layers[0].kind for name, model in known_models().items()}
    assert kinds["llama-2-7b"] == "MHA"
    assert kinds["llama-3-8b"] == "GQA"
    assert kinds["deepseek-v3"] == "MLA"


@pytest.mark.parametrize(
    ("name", "dim_64", "dim_128"),
    [("bf16", 256, 512), ("fp16", 256, 512), ("fp32", 512, 1024), ("fp8", 128, 256), ("int8", 132, 260),
     ("k8v4", 100, 196), ("int4", 68, 132)],
)  # fmt: skip
def test_bytes_of_a_head_by_format(name, dim_64, dim_128):
    sizes = [bytes_per_token(Model("m", (Layer(1, 1, dim, dim),)), FORMATS[name]) for dim in (64, 128)]
    assert sizes == [dim_64, dim_128]


def test_a_page_of_a_small_format_is_padded():
    """page_bytes = align16(page_size * heads * code_bytes) + align16(page_size * heads * 2), for K and for V."""
    model = Model("m", (Layer(9, 3, 64, 64),))
    assert bytes_per_page(model, FORMATS["int8"], 1) == 2 * 208
    assert bytes_per_page(model, FORMATS["int8"], 16) == 2 * (16 * 3 * 64 + 96)
    assert bytes_per_page(model, FORMATS["k8v4"], 1) == (192 + 16) + (96 + 16)
    assert bytes_per_page(model, BF16, 1) == bytes_per_token(model, BF16)
    with pytest.raises(InvalidArgument, match="ends inside a byte"):
        bytes_per_page(Model("m", (Layer(1, 1, 33, 33),)), FORMATS["int4"])


def test_the_largest_batch():
    model = read_model("llama-3-8b")
    room = fit(model, BF16, 80 * GIB, 16 * GIB, reserve=0.1)
    assert room.requests_of(2048) == 230
    assert room.num_bytes == int(57.6 * GIB)
    assert room.num_tokens == 16 * room.num_pages
    assert room.num_pages * room.page_bytes <= room.num_bytes < (room.num_pages + 1) * room.page_bytes
    assert fit(model, BF16, 15 * GIB, 16 * GIB).num_pages == 0
    with pytest.raises(InvalidArgument, match="reserve"):
        fit(model, BF16, 80 * GIB, reserve=1.0)


def test_requests_fill_whole_pages():
    room = fit(read_model("llama-3-8b"), BF16, 100 * 2 * MIB, reserve=0)
    assert (room.num_pages, room.requests_of(16), room.requests_of(17), room.requests_of(1600)) == (100, 100, 50, 1)
    assert room.requests_of(1601) == 0


def test_waste():
    assert round(100 * preallocation_waste(500, 4096), 1) == 87.8
    assert round(100 * preallocation_waste(50, 2048), 1) == 97.6
    for used in range(1, 100):
        pages = -(-used // 16)
        assert paging_waste(used, 16) == 1 - used / (16 * pages)
        assert 16 * pages - used <= 15
    with pytest.raises(InvalidArgument):
        preallocation_waste(5, 4)


def test_windows():
    model = read_model("gpt-oss-20b")
    assert [(layer.window, n) for layer, n in model.groups()] == [(128, 12), (None, 12)]
    assert bytes_per_token(model, BF16) == 24 * 2 * 8 * 64 * 2
    row = 2 * 8 * 64 * 2
    assert bytes_per_request(model, BF16, 1000, keep_windows_only=True) == 12 * row * 1000 + 12 * row * 128
    assert bytes_per_request(model, BF16, 100, keep_windows_only=True) == bytes_per_request(model, BF16, 100)


def test_groups_of_layers_of_different_sizes():
    small, large = read_model("gemma-4-e4b"), read_model("gemma-4-31b")
    assert (bytes_per_token(small, BF16), bytes_per_token(large, BF16)) == (57_344, 901_120)
    assert small.num_sharing_layers == 18
    assert [(g.num_kv_heads, g.k_dim, g.window, n) for g, n in small.groups()] == [(2, 256, 512, 20), (2, 512, None, 4)]
    assert [(g.num_kv_heads, g.k_dim, g.window, n) for g, n in large.groups()] == [
        (16, 256, 1024, 50),
        (4, 512, None, 10),
    ]


def test_memory_for_a_hit_rate():
    requests = list(generate("chat", 200, seed=1))
    curve = capacity_curve(requests, 16)
    need = need_for(curve, 0.6, 1000)
    at_need = replay(requests, need.num_tokens, 16, page_aligned=True).hit_rate
    below = replay(requests, need.num_tokens - 16, 16, page_aligned=True).hit_rate
    assert at_need == need.hit_rate
    assert below < 0.6 <= at_need
    assert need.num_bytes == 1000 * need.num_pages
    with pytest.raises(InvalidArgument, match="the best is 0.8818, from 2611 pages"):
        need_for(curve, 1.0, 1000)
    with pytest.raises(InvalidArgument, match="as 0.9; got 90"):
        need_for(curve, 90, 1000)


def test_bytes_for_people():
    assert [format_bytes(n) for n in (0, 512, 23_040, 70_272, 2**20, 3.125 * GIB, 1023 * KIB)] == [
        "0 B", "512 B", "22.5 KiB", "68.62 KiB", "1 MiB", "3.125 GiB", "1,023 KiB",
    ]  # fmt: skip


STOCK = [
    ("llama", llama(4, 8, 2)),
    ("mistral", llama(4, 8, 2, sliding_window=64)),
    ("qwen2", llama(4, 8, 2, sliding_window=64, use_sliding_window=False)),
    ("qwen2", llama(4, 8, 2, sliding_window=64, use_sliding_window=True, max_window_layers=2)),
    ("qwen3", llama(4, 8, 2, head_dim=32)),
    ("gemma2", llama(4, 8, 2, head_dim=32, sliding_window=64)),
    ("gemma3_text", llama(12, 8, 2, head_dim=32, sliding_window=64)),
    ("gemma4_text", llama(12, 8, 2, head_dim=32, sliding_window=64, num_kv_shared_layers=4)),
    ("gemma4_text", llama(12, 8, 4, head_dim=32, num_global_key_value_heads=2, attention_k_eq_v=True)),
    ("cohere2", llama(8, 8, 2, sliding_window=64)),
    ("gpt_oss", llama(6, 8, 2, head_dim=32, sliding_window=64)),
    ("deepseek_v3", llama(4, 8, 8, kv_lora_rank=64, qk_rope_head_dim=16)),
    ("gpt2", {"n_layer": 3, "n_head": 4, "n_embd": 64}),
    ("gpt_bigcode", {"n_layer": 3, "n_head": 4, "n_embd": 64}),
    ("falcon", {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 64}),
    ("qwen3_next", llama(8, 8, 2, head_dim=32)),
    ("jamba", llama(8, 8, 2)),
    ("llama4_text", llama(8, 8, 2)),
]


@pytest.mark.parametrize(("model_type", "sizes"), STOCK, ids=lambda x: x if isinstance(x, str) else "")
def test_configurations_are_read_as_transformers_reads_them(model_type, sizes):
    """What transformers saves and what a hub has, with its defaults missing, give the layers that it would build."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    attention = [kind for kind in kinds if kind != "linear_attention"]
    attention = attention[: len(attention) - (getattr(config, "num_kv_shared_layers", 0) or 0)]
    saved = model_from_config(json.loads(json.dumps(config.to_dict())), model_type)
    assert len(saved.layers) == len(attention)
    if model_type not in ("mistral",):  # whose one window is in no list of types
        assert [layer.window is not None for layer in saved.layers] == [k not in ("full_attention",) for k in attention]
    if model_type not in ("jamba", "qwen3_next", "llama4_text", "gemma4_text"):  # whose defaults decide
        bare = model_from_config({**sizes, **_defaults(model_type, config)}, model_type)
        assert bare.layers == saved.layers


def _defaults(model_type, config):
    """What a published config.json of the family never leaves out."""
    names = ("multi_query", "sliding_window") if model_type != "qwen2" else ()
    return {"model_type": model_type} | {name: getattr(config, name) for name in names if hasattr(config, name)}


def test_what_a_configuration_does_not_say_is_an_error():
    with pytest.raises(InvalidArgument, match="num_hidden_layers or n_layer"):
        model_from_config({"hidden_size": 4}, "x")
    with pytest.raises(InvalidArgument, match="encoder-decoder"):
        model_from_config({"is_encoder_decoder": True}, "x")
    with pytest.raises(InvalidArgument, match="layers of type retention"):
        model_from_config(llama(1, 1, 1, layer_types=["retention"]), "x")
    with pytest.raises(InvalidArgument, match="no layer keeps"):
        model_from_config(llama(1, 1, 1, layer_types=["mamba"]), "x")
    with pytest.raises(InvalidArgument, match="no multiple"):
        model_from_config(llama(1, 5, 2), "x")


def test_models_are_found(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"text_config": llama(2, 4, 2)}))
    assert read_model(str(folder)) == read_model(str(folder / "config.json"))
    assert (read_model(str(folder)).name, read_model(str(folder)).weight_bytes) == ("mine", None)
    for name, size in (("model-1.safetensors", 70), ("model-2.safetensors", 30), ("consolidated.safetensors", 100)):
        (folder / name).write_bytes(b"x" * size)
    assert read_model(str(folder)).weight_bytes == 100
    with pytest.raises(ModelNotFound, match="did you mean llama-3-8b"):
        read_model("llama3-8b")
    (folder / "config.json").write_text("[1]")
    with pytest.raises(InvalidArgument, match="holds a list"):
        read_model(str(folder))


def gguf_bytes(fields):
    """The head of a GGUF file, written by hand."""

    def text(value):
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def value_of(value):
        if isinstance(value, list):
            return struct.pack("<IIQ", 9, 4, len(value)) + struct.pack(f"<{len(value)}I", *value)
        return struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<II", 4, value)

    head = b"GGUF" + struct.pack("<IQQ", 3, 0, len(fields))
    return head + b"".join(text(key) + value_of(value) for key, value in fields.items())


FIELDS = {
    "general.architecture": "gemma3", "gemma3.block_count": 12, "gemma3.embedding_length": 512,
    "gemma3.attention.head_count": 8, "gemma3.attention.head_count_kv": 2, "gemma3.attention.key_length": 32,
    "gemma3.attention.value_length": 32, "gemma3.attention.sliding_window": 64, "gemma3.context_length": 999,
}  # fmt: skip


def test_gguf(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(FIELDS))
    model = read_model(str(path))
    assert [layer.window for layer in model.layers] == [64, 64, 64, 64, 64, None] * 2
    assert {layer.k_dim for layer in model.layers} == {32}
    assert (model.max_length, model.weight_bytes) == (999, path.stat().st_size)
    hybrid = {**FIELDS, "gemma3.attention.head_count_kv": [0, 2] * 6}
    path.write_bytes(gguf_bytes(hybrid))
    assert (len(read_model(str(path)).layers), read_model(str(path)).num_state_layers) == (6, 6)
    latent = {**FIELDS, "gemma3.attention.kv_lora_rank": 512, "gemma3.rope.dimension_count": 64}
    path.write_bytes(gguf_bytes(latent))
    assert read_model(str(path)).layers[0] == Layer(8, 1, 576, 0, 64)


def test_gguf_of_several_files(tmp_path):
    first = tmp_path / "m-00001-of-00002.gguf"
    first.write_bytes(gguf_bytes(FIELDS))
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(b"x" * 1000)
    assert read_model(str(first)).weight_bytes == first.stat().st_size + 1000
    assert read_model(str(tmp_path)).weight_bytes == first.stat().st_size + 1000


def test_a_broken_gguf_is_an_error_and_nothing_else(tmp_path):
    path, whole = tmp_path / "m.gguf", gguf_bytes(FIELDS)
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(InvalidArgument):
            read_model(str(path))
    unread = 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
        try:
            read_model(str(path))
        except InvalidArgument:
            unread += 1
    assert unread > len(whole) // 2


def test_a_real_gguf_is_read_as_its_own_library_reads_it():
    gguf = pytest.importorskip("gguf")
    demo = pytest.importorskip("radixkv.demo.model")
    try:
        path = demo.find_model(None)
    except ModelNotFound:
        pytest.skip("the demo's model is not installed")
    fields = gguf.GGUFReader(path).fields
    model = read_model(str(path))
    assert len(model.layers) == fields["llama.block_count"].contents()
    assert {layer.num_kv_heads for layer in model.layers} == {fields["llama.attention.head_count_kv"].contents()}
    assert bytes_per_token(model, BF16) == 23_040


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "fp8"])
def test_a_page_is_what_the_pool_allocates(name):
    """For the formats that there are: padding included, and K and V of different dimensions."""
    dtypes = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8_e4m3fn"}
    stored = LayerFormat(RowFormat(dtypes[name]), RowFormat(dtypes[name]))
    for heads, k_dim, v_dim, page_size in itertools.product((1, 3, 8), (8, 64, 192), (8, 128), (1, 5, 16)):
        shape, model = LayerShape(heads, heads, k_dim, v_dim), Model("m", (Layer(heads, heads, k_dim, v_dim),))
        assert bytes_per_page(model, FORMATS[name], page_size) == stored.page_bytes(page_size, shape)
        assert bytes_per_token(model, FORMATS[name]) == stored.token_bytes(shape)
