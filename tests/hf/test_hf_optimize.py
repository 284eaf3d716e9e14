"""optimize: the same answers from rewritten layers, or a refusal that leaves the model as it was."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from radixkv import InvalidArgument
from radixkv.hf import Generator, engine_for, forward, linear, optimize
from radixkv.hf.adapter import probe
from radixkv.hf.linear import PackedLinear
from tests.hf.helpers import (
    ARCHITECTURES,
    SIZES,
    VOCABULARY,
    assert_drains,
    build,
    random_prompts,
    stock_tokens,
    tiny,
)

COUNT = 12
TAKEN = ("llama", "qwen2", "mistral-window", "qwen3", "qwen3-moe", "gemma2-window-softcap", "gemma3-window")
TAKEN += ("phi3-packed-qkv",)


def optimized(architecture="llama", dtype=torch.float32):
    model = tiny(architecture).to(dtype)
    optimize(model)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"hidden_act": "gelu"},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 24},
    ],
    ids=str,
)
def test_llamas_of_many_builds_give_the_stock_tokens(changes):
    model = build("LlamaConfig", "LlamaForCausalLM", changes)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    assert_stock_tokens(model)


@pytest.mark.parametrize("architecture", TAKEN)
def test_greedy_tokens_equal_stock_cold_and_warm(architecture):
    assert_stock_tokens(random_norms(tiny(architecture)))


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Gemma", {}),
        ("Gemma3", {"layer_types": ["full_attention", "sliding_attention"] * 2, "num_hidden_layers": 4}),
        ("Glm", {"partial_rotary_factor": 0.5}),
        ("Glm", {"attention_bias": True, "partial_rotary_factor": 1.0}),
        ("Phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("Mixtral", MIXTURE),
        ("Mixtral", MIXTURE | {"sliding_window": 8}),
        ("Qwen3Moe", {**EXPERTS, "decoder_sparse_step": 2}),
        ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True}),
    ],
    ids=str,
)
def test_other_builds_give_the_stock_tokens(family, changes):
    """Norms by one more than their weight, rotary embedding of neighbours and of a part of a head, experts."""
    config = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    assert_stock_tokens(random_norms(build(config, f"{family}ForCausalLM", changes)))


def random_norms(model):
    """As built, all have weight one: whatever is done with it, the answer is the same."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += torch.rand(parameter.shape, generator=generator) - 0.5
    return model


def assert_stock_tokens(model):
    prompts = random_prompts(33, 1, 18, 5)
    prompts.append(prompts[0][:21] + prompts[2])
    expected = [stock_tokens(model, prompt, COUNT) for prompt in prompts]
    optimize(model)
    engine = engine_for(model, num_pages=128, page_size=4)
    with Generator(model, engine) as generator:
        for _ in ("cold", "warm"):
            requests = [generator.submit(prompt, max_new_tokens=COUNT) for prompt in prompts]
            generator.run()
            assert [request.tokens for request in requests] == expected
    assert requests[0].stats.cached_tokens >= 32
    assert_drains(engine)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shared=st.integers(0, 40),
    tails=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    page_size=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 1000),
)
def test_a_hit_changes_no_token_in_float32(shared, tails, page_size, seed):
    """The same requests alone and cold, and then together over whatever the others left behind."""
    model = test_a_hit_changes_no_token_in_float32.__dict__.setdefault("model", optimized())
    prefix, *rest = random_prompts(shared, *tails, seed=seed)
    prompts = [prefix + tail for tail in rest]

    def tokens(engine, batch):
        with Generator(model, engine) as generator:
            requests = [generator.submit(prompt, max_new_tokens=6) for prompt in batch]
            generator.run()
        return [request.tokens for request in requests]

    engine = engine_for(model, num_pages=400, page_size=page_size)
    cold = []
    for prompt in prompts:
        engine.cache.clear()
        cold += tokens(engine, [prompt])
    assert tokens(engine, prompts) == cold
    assert tokens(engine, prompts) == cold
    assert_drains(engine)


@pytest.mark.parametrize("architecture", ["llama", "gemma3-window", "phi3-packed-qkv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_stay_within_the_rounding_of_the_dtype(dtype, architecture):
    prompts = random_prompts(1, 40, 17)
    model = random_norms(tiny(architecture)).to(dtype)
    with torch.inference_mode():
        expected = torch.stack([model.float()(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
        model.to(dtype)
        stock = torch.stack([model(torch.tensor([prompt])).logits[0, -1].float() for prompt in prompts])
        optimize(model)
        engine = engine_for(model, num_pages=64, page_size=8)
        leases = [engine.acquire(prompt) for prompt in prompts]
        with engine.step(leases) as step:
            logits = forward(model, step)
    assert logits.dtype == dtype
    error, stock_error = ((x.float() - expected).abs().max() for x in (logits, stock))
    assert error <= 2 * stock_error + 1e-4
    for lease in leases:
        lease.release()
    assert_drains(engine)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in TAKEN])
def test_other_builds_are_refused_and_stay_as_they_were(architecture):
    model = tiny(architecture)
    prompt = random_prompts(9)[0]
    expected = stock_tokens(model, prompt, 4)
    with pytest.raises(InvalidArgument, match="not built like Llama's|something else than a layer of Llama's build"):
        optimize(model)
    assert model.config._attn_implementation == "eager"
    assert stock_tokens(model, prompt, 4) == expected


SCALED_BY_POSITION = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 48,
    "llama_4_scaling_beta": 0.1,
}


def test_a_model_that_scales_queries_by_position_is_refused_and_answers_rightly_beyond_its_original_length():
    """Ministral 3: nothing differs before position 48, and the comparison once looked at no later one."""
    model = build("Ministral3Config", "Ministral3ForCausalLM", {"rope_parameters": SCALED_BY_POSITION})
    prompt = random_prompts(90)[0]
    expected = stock_tokens(model, prompt, COUNT)
    with pytest.raises(InvalidArgument, match="layer 0 of Ministral3ForCausalLM computes something else"):
        optimize(model)
    engine = engine_for(model, num_pages=32, page_size=4)
    with Generator(model, engine) as generator:
        request = generator.submit(prompt, max_new_tokens=COUNT)
        generator.run()
    assert request.tokens == expected


@pytest.mark.parametrize("threshold", [1, 48, 96, 255, 511])
def test_a_change_at_any_telling_position_is_found(threshold):
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 48}
    model = build("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": rope})
    attention = type(model.model.layers[1].self_attn)

    class Changing(attention):
        def forward(self, hidden_states, position_ids=None, **options):
            changed = (position_ids >= threshold).unsqueeze(-1)
            return super().forward(torch.where(changed, 1.2 * hidden_states, hidden_states), **options)

    model.model.layers[1].self_attn.__class__ = Changing
    with pytest.raises(InvalidArgument, match="layer 1 of LlamaForCausalLM computes something else"):
        optimize(model)


def test_a_model_that_does_not_say_how_many_positions_it_has_is_refused():
    model = tiny()
    vars(model.config)["max_position_embeddings"] = None
    with pytest.raises(InvalidArgument, match="does not say how many positions"):
        optimize(model)


def scale_residuals(model):
    layer = model.model.layers[1]
    layer.mlp.forward = lambda x: 0.5 * type(layer.mlp).forward(layer.mlp, x)


def add_one_to_the_norm(model):
    class Shifted(type(model.model.norm)):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + hidden_states

    model.model.layers[2].input_layernorm.__class__ = Shifted


def hook_a_layer(model):
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: None)


def subclass_a_projection(model):
    class Quantized(torch.nn.Linear):
        pass

    model.model.layers[0].mlp.up_proj.__class__ = Quantized


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (scale_residuals, "layer 1 of LlamaForCausalLM computes something else"),
        (add_one_to_the_norm, "layer 2 of LlamaForCausalLM computes something else"),
        (hook_a_layer, "self_attn in layer 0 of LlamaForCausalLM has forward hooks"),
        (subclass_a_projection, "mlp.up_proj in layer 0 .* is a Quantized"),
        (lambda model: model.train(), r"training mode: call model.eval\(\)"),
        (lambda model: model.to("meta"), "is on meta"),
        (optimize, "optimized already"),
    ],
)
def test_what_would_change_the_answer_is_refused(change, message):
    model = tiny()
    change(model)
    layers = model.model.layers
    with pytest.raises(InvalidArgument, match=message):
        optimize(model)
    assert model.model.layers is layers


def test_an_optimized_model_refuses_what_it_can_no_longer_do():
    model = optimized()
    assert len(probe(model).layers) == SIZES["num_hidden_layers"]
    with pytest.raises(InvalidArgument, match="without an open step"):
        model(torch.tensor([[1, 2, 3]]))
    with pytest.raises(InvalidArgument, match="save it before"):
        model.state_dict()
    with pytest.raises(InvalidArgument, match="converted"):
        model.to(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biases", [(False, False), (True, False), (True, True)])
def test_packed_linears_are_their_layers_side_by_side(dtype, biases):
    torch.manual_seed(1)
    layers = [torch.nn.Linear(24, 8 * (i + 1), bias=bias, dtype=dtype) for i, bias in enumerate(biases)]
    with torch.inference_mode():
        for rows in (1, 3, 70):
            x = torch.randn(rows, 24, dtype=dtype)
            expected = torch.cat([layer(x) for layer in layers], dim=-1)
            torch.testing.assert_close(PackedLinear(layers)(x), expected, rtol=2e-2, atol=2e-2)


def test_vocabulary_is_whole():
    model = optimized()
    engine = engine_for(model, num_pages=8)
    with torch.inference_mode(), engine.acquire([1, 2, 3]) as lease, engine.step([lease]) as step:
        assert forward(model, step).shape == (1, VOCABULARY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_where_there_are_no_products_of_16_bits_weights_are_widened(dtype, monkeypatch):
    """Block by block, in float32: nearer to the product of the weights than torch's own."""
    monkeypatch.setattr(linear, "multiplies", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(linear, "WIDENED_BYTES", 4 * 24 * 5)  # blocks of five outputs, and one of three
    torch.manual_seed(1)
    layer = torch.nn.Linear(24, 18, dtype=dtype)
    packed = PackedLinear([layer])
    with torch.inference_mode():
        for shape in ((1, 24), (3, 24), (2, 7, 24)):
            x = torch.randn(shape, dtype=dtype)
            expected = x.double() @ layer.weight.double().T + layer.bias.double()
            found = packed(x)
            assert found.dtype == dtype
            assert found.shape == (*shape[:-1], 18)
            torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-2)
            if shape != (1, 24):
                torch.testing.assert_close(found, expected.to(dtype), rtol=1e-2, atol=1e-6)


def test_a_model_whose_products_are_slow_here_is_warned_of(monkeypatch, recwarn):
    monkeypatch.setattr(linear, "multiplies", lambda dtype: dtype == torch.float32)
    model = tiny().to(torch.bfloat16)
    engine_for(model, num_pages=8)  # too small for it to matter
    monkeypatch.setattr(linear, "_WORTH_A_WARNING", 1000)
    engine_for(tiny(), num_pages=8)
    assert not recwarn.list
    with pytest.warns(RuntimeWarning, match=r"is in bfloat16, .* call radixkv.hf.optimize\(model\) before engine_for"):
        engine_for(model, num_pages=8)
    optimize(model)
    engine_for(model, num_pages=8)
    monkeypatch.undo()
    assert not recwarn.list
