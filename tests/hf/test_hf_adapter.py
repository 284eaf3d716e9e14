"""The adapter: other people's models, unchanged, give the same answers on the engine."""

import numpy as np
import pytest
import torch

from radixkv import InvalidArgument, InvalidTokens
from radixkv.formats import fp8
from radixkv.hf import Generator, attach, engine_for, forward
from radixkv.hf.adapter import current_step, length_limit, probe, running
from radixkv.hf.config import placeholder_tokens, refuse_placeholders
from radixkv.shape import LayerShape
from tests.hf.helpers import (
    ARCHITECTURES,
    IMAGE,
    SIZES,
    assert_drains,
    build,
    random_model,
    random_prompts,
    stock_tokens,
    tiny,
    vision_model,
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_equal_stock_cold_and_warm(architecture):
    model = tiny(architecture)
    prompts = random_prompts(33, 1, 18, 5)
    prompts.append(prompts[0][:21] + prompts[2])
    expected = [stock_tokens(model, prompt, 12) for prompt in prompts]
    engine = engine_for(model, num_pages=128, page_size=4)
    with Generator(model, engine) as generator:
        for _ in ("cold", "warm"):
            requests = [generator.submit(prompt, max_new_tokens=12) for prompt in prompts]
            generator.run()
            assert [request.tokens for request in requests] == expected
    assert requests[0].stats.cached_tokens >= 32
    assert_drains(engine)


def test_logits_of_a_ragged_batch_equal_the_stock_forward():
    model = tiny()
    prompts = random_prompts(1, 40, 17)
    with torch.inference_mode():
        expected = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
        engine = engine_for(model, num_pages=64, page_size=8)
        with engine.acquire(prompts[1][:30]) as lease, engine.step([lease]) as step:
            forward(model, step)
        leases = [engine.acquire(prompt) for prompt in prompts]
        assert leases[1].num_cached == 30
        with engine.step(leases) as step:
            logits = forward(model, step)
    assert logits.shape == (3, SIZES["vocab_size"])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for lease in leases:
        lease.release()
    assert_drains(engine)


def test_k_and_v_in_8_bits():
    model = tiny()
    engine = engine_for(model, num_pages=64, page_size=4, kv_format=fp8(k_scale=0.5, v_scale=0.25))
    assert engine.pool.nbytes * 4 == engine_for(model, num_pages=64, page_size=4).pool.nbytes
    (prompt,) = random_prompts(30)
    with Generator(model, engine) as generator:
        tokens = []
        for _ in ("cold", "warm"):
            request = generator.submit(prompt, max_new_tokens=8)
            generator.run()
            tokens.append(request.tokens)
    assert tokens[0] == tokens[1]
    assert request.stats.cached_tokens == 29
    assert_drains(engine)


def test_sliding_window_is_counted_as_transformers_counts_it():
    model = build("MistralConfig", "MistralForCausalLM", {"sliding_window": 4})
    prompt = random_prompts(9)[0]
    with torch.inference_mode():
        windowed = model(torch.tensor([prompt])).logits[0, -1]
        engine = engine_for(model, num_pages=8, page_size=4)
        with engine.acquire(prompt) as lease, engine.step([lease]) as step:
            logits = forward(model, step)[0]
        model.set_attn_implementation("eager")
        model.config.sliding_window = 5
        wider = model(torch.tensor([prompt])).logits[0, -1]
    assert (windowed - wider).abs().max() > 1e-2, "the prompt must tell the windows apart"
    torch.testing.assert_close(logits, windowed, rtol=1e-4, atol=1e-4)


def test_probe_reads_the_geometry_and_restores_the_attention():
    model = tiny()
    shape = probe(model)
    assert shape.layers == (LayerShape(4, 2, 16),) * 3
    assert shape.dtype == torch.float32
    assert model.config._attn_implementation == "eager"
    engine = engine_for(model.to(torch.bfloat16), num_pages=8)
    assert engine.dtype == torch.bfloat16


def test_layers_that_differ_are_observed_and_answer_as_stock_does():
    """Keys of 24 and values of 16 dimensions; and local and global layers of different heads."""
    latent = build("DeepseekV3Config", "DeepseekV3ForCausalLM", LATENT)
    engine = engine_for(latent, num_pages=32, page_size=4)
    assert set(engine.layers) == {LayerShape(4, 4, 24, 16)}
    prompts = random_prompts(21, 9)
    with Generator(latent, engine) as generator:
        for _ in ("cold", "warm"):
            requests = [generator.submit(prompt, max_new_tokens=6) for prompt in prompts]
            generator.run()
            for request, prompt in zip(requests, prompts, strict=True):
                assert request.tokens == stock_tokens(latent, prompt, 6)
    assert requests[0].stats.cached_tokens > 0
    assert_drains(engine)


def test_another_dtype_is_refused():
    with pytest.raises(InvalidArgument, match=r"torch.float32, not torch.bfloat16"):
        engine_for(tiny(), num_pages=8, dtype=torch.bfloat16)


def test_an_attached_model_without_a_step_says_what_to_do():
    model = tiny()
    attach(model)
    with pytest.raises(InvalidArgument, match=r"without an open step.*set_attn_implementation"):
        model(torch.tensor([[1, 2, 3]]))
    model.set_attn_implementation("eager")
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, SIZES["vocab_size"])


def test_the_open_step_is_the_innermost_one_and_never_outlives_its_pass():
    """Two engines, one model run inside the other's forward pass, and a pass that fails."""
    outer, inner = tiny(), tiny("qwen2")
    engines = [engine_for(model, num_pages=8, page_size=4) for model in (outer, inner)]
    (prompt,) = random_prompts(6)
    expected = [stock_tokens(model, prompt, 1)[0] for model in (outer, inner)]
    found = []

    def run(model, engine):
        with torch.inference_mode(), engine.acquire(prompt) as lease, engine.step([lease]) as step:
            return int(forward(model, step)[0].argmax())

    handle = outer.model.layers[1].register_forward_pre_hook(lambda *_: found.append(run(inner, engines[1])))
    assert [run(outer, engines[0]), *found] == expected
    handle.remove()
    outer.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(outer, engines[0])
    with pytest.raises(InvalidArgument, match="without an open step"):
        current_step(outer)
    with running("a stand-in"):
        assert current_step(outer) == "a stand-in"


class TestModelsThatReadImages:
    def test_text_gives_the_stock_tokens_and_the_vision_tower_still_runs(self):
        model = vision_model()
        pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            features = model.get_image_features(pixels, return_dict=True).pooler_output[0]
        prompt = [token for token in random_prompts(20)[0] if token != IMAGE]
        expected = stock_tokens(model, prompt, 6)
        engine = engine_for(model, num_pages=32, page_size=4)
        with Generator(model, engine) as generator:
            with pytest.raises(InvalidTokens, match=r"token 90 at position 1 stands for an image"):
                generator.submit([1, IMAGE, 3])
            request = generator.submit(prompt, max_new_tokens=6)
            generator.run()
        assert request.tokens == expected
        with torch.inference_mode():
            again = model.get_image_features(pixels, return_dict=True).pooler_output[0]
        assert torch.equal(features, again)
        assert_drains(engine)

    def test_only_the_text_part_is_switched_and_comes_back(self):
        model = vision_model()
        probe(model)
        assert model.config.text_config._attn_implementation == "eager"
        attach(model)
        assert model.config.text_config._attn_implementation == "radixkv"
        assert model.config.vision_config._attn_implementation == "eager"
        model.set_attn_implementation("eager")
        assert model.config.text_config._attn_implementation == "eager"

    def test_placeholders_are_known_and_refused(self):
        placeholders = placeholder_tokens(vision_model())
        assert placeholders == {IMAGE}
        refuse_placeholders(np.array([1, 2, 3]), placeholders)
        with pytest.raises(InvalidTokens, match=r"token 90 at position 2 stands for an image.* 3 of 6 tokens"):
            refuse_placeholders(np.array([1, 2, IMAGE, IMAGE, IMAGE, 3]), placeholders)
        assert placeholder_tokens(tiny()) == frozenset()


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
LATENT = {
    "head_dim": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
OPT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_experts_per_tok": 1, "moe_intermediate_size": 32}

# Every entry: configuration class, model class, what the error says, options.
UNSUPPORTED = {
    "encoder-decoder": (
        "T5Config",
        "T5ForConditionalGeneration",
        "encoder-decoder",
        {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
    ),
    "recurrent": ("MambaConfig", "MambaForCausalLM", "linear_attention|state between tokens", SMALL),
    "linear attention": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        "linear_attention|state between tokens",
        SMALL | EXPERTS | {"num_experts": 2},
    ),
    "positions counted in the batch": (
        "BartConfig",
        "BartForCausalLM",
        "computes other rows when their order changes",
        {"d_model": 64, "decoder_layers": 2, "encoder_layers": 2, "decoder_ffn_dim": 96, "decoder_attention_heads": 4},
    ),
    "a window in the mask only": (
        "PhimoeConfig",
        "PhimoeForCausalLM",
        "layer 0 of PhimoeForCausalLM has a window of 8",
        SMALL | {"num_local_experts": 2, "sliding_window": 8},
    ),
    "hybrid with a recurrent layer": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        "layers of type linear_attention",
        SMALL | {"layer_types": ["full_attention", "linear_attention"], "mamba_n_heads": 8},
    ),
    "needs pixels": (
        "Blip2Config",
        "Blip2ForConditionalGeneration",
        "cannot run on tokens alone.*pixel_values",
        {"text_config": {"model_type": "opt", "word_embed_proj_dim": 64, "ffn_dim": 96, "vocab_size": 97} | OPT}
        | {"vision_config": OPT, "qformer_config": OPT, "num_query_tokens": 2},
    ),
    "own attention code": ("BloomConfig", "BloomForCausalLM", "AttentionInterface", {"n_layer": 2, "n_head": 4}),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_models_that_cannot_be_paged_are_refused(kind):
    config_name, model_name, message, options = UNSUPPORTED[kind]
    sizes = {} if kind in ("encoder-decoder", "needs pixels") else {"hidden_size": 64, "intermediate_size": 96}
    model = random_model(config_name, model_name, {"vocab_size": 97, "pad_token_id": 0} | sizes | options)
    before = model.config._attn_implementation
    with pytest.raises(InvalidArgument, match=message):
        engine_for(model, num_pages=8)
    assert model.config._attn_implementation == before


def mix_neighbours(model):
    """A token shift before the layers, as RWKV's: state that no configuration and no flag tells of."""

    def shift(hidden):
        return torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)

    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + shift(args[0]), *args[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_depend_on_their_neighbours_are_found(dtype):
    model = tiny().to(dtype)
    probe(model)
    mix_neighbours(model)
    with pytest.raises(InvalidArgument, match="computes other rows when their order changes"):
        probe(model)


def test_dropout_is_named_as_what_it_is():
    model = build("LlamaConfig", "LlamaForCausalLM", {})
    model.model.layers[0].mlp.act_fn = torch.nn.Dropout()
    model.train()
    with pytest.raises(InvalidArgument, match=r"training mode.*model.eval\(\)"):
        probe(model)


def test_length_limit_stops_where_rotary_embeddings_would_depend_on_the_batch():
    assert length_limit(tiny()) == 512
    scaled = {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 128,
        }
    }
    assert length_limit(build("LlamaConfig", "LlamaForCausalLM", scaled)) == 128
