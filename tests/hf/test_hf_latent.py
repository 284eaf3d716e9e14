"""latent(): models that keep one latent row a token answer as before; what cannot be rewritten is left as it was."""

import copy
import types

import pytest
import torch

from radixkv import InvalidArgument
from radixkv.formats import FORMATS
from radixkv.hf import EngineCache, Generator, absorbed, engine_for, forward, latent, optimize
from radixkv.hf.absorbed import head_values, latent_queries
from radixkv.shape import LayerShape
from tests.hf.helpers import assert_drains, build, random_prompts, stock_tokens, tiny, transformers

MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "mscale": 0.7,
        "mscale_all_dim": 0.7,
    }
}
FAMILIES = {
    "deepseek v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", MLA | {"q_lora_rank": None}),
    "deepseek v3, yarn": ("DeepseekV3Config", "DeepseekV3ForCausalLM", MLA | YARN),
    "glm 4.7 flash": ("Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM", MLA | {"mlp_layer_types": ["dense"] * 3}),
    "minicpm3": ("MiniCPM3Config", "MiniCPM3ForCausalLM", MLA),
    "longcat flash": ("LongcatFlashConfig", "LongcatFlashForCausalLM", MLA | {"num_layers": 2, "ffn_hidden_size": 64}),
}
ROW = LayerShape(4, 1, 40, 32, latent=True)


def deepseek(**changes: object) -> "transformers.PreTrainedModel":
    config, model, sizes = FAMILIES["deepseek v3, yarn"]
    return build(config, model, sizes | changes)


def answer(model: "transformers.PreTrainedModel", prompt: list[int]) -> list[int]:
    with Generator(model, engine_for(model, num_pages=32)) as generator:
        request = generator.submit(prompt, max_new_tokens=4)
        generator.run()
    return request.tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_stock(name):
    """Cold, and warm from any token of a page, all prompts in one batch; and without the engine as before."""
    model = build(*FAMILIES[name])
    prompts = random_prompts(43, 9, 1)
    prompts.append(prompts[0][:30] + prompts[1])
    expected = [stock_tokens(model, prompt, 8) for prompt in prompts]
    latent(model)
    engine = engine_for(model, num_pages=64, page_size=4)
    assert set(engine.layers) == {ROW}
    with Generator(model, engine) as generator:
        for _ in ("cold", "warm"):
            requests = [generator.submit(prompt, max_new_tokens=8) for prompt in prompts]
            generator.run()
            assert [request.tokens for request in requests] == expected
    assert requests[0].stats.cached_tokens == len(prompts[0]) - 1
    model.set_attn_implementation("eager")
    assert [stock_tokens(model, prompt, 8) for prompt in prompts] == expected
    assert_drains(engine)


def test_a_pool_of_latents_is_as_small_as_the_formula_says():
    model = deepseek()
    expanded = engine_for(model, num_pages=4, page_size=16)
    latent(model)
    engine = engine_for(model, num_pages=4, page_size=16)
    assert engine.pool.page_bytes == 3 * 16 * (32 + 8) * 4
    assert expanded.pool.page_bytes == 3 * 16 * 4 * (24 + 24) * 4
    assert engine.pool.page_bytes == sum(FORMATS["fp32"].page_bytes(16, shape) for shape in engine.layers)


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_generate_over_the_engines_latents(name):
    """transformers caches latents as well; the pages are those that the absorbed attention wrote."""
    model = build(*FAMILIES[name])
    [prompt] = random_prompts(27)
    expected = stock_tokens(model, prompt, 8)
    input_ids = torch.tensor([prompt])
    expanded = engine_for(model, num_pages=8)
    message = "layer 0 of .* stores 1 heads .* these are latents: call radixkv.hf.latent.model. before engine_for"
    with pytest.raises(InvalidArgument, match=message):
        EngineCache(expanded, model, input_ids)
    latent(model)
    engine = engine_for(model, num_pages=64, page_size=4)
    for cached in (0, 26):
        with EngineCache(engine, model, input_ids) as past:
            output = past.generate(max_new_tokens=8, do_sample=False)
        assert (output[0, 27:].tolist(), past.num_cached) == (expected, cached)
    longer = prompt + expected + [5, 6]
    with Generator(model, engine) as generator:
        request = generator.submit(longer, max_new_tokens=4)
        generator.run()
    assert request.stats.cached_tokens == 27 + 7
    model.set_attn_implementation("eager")
    assert request.tokens == stock_tokens(model, longer, 4)
    with EngineCache(engine, model, torch.tensor([longer])) as past:
        output = past.generate(max_new_tokens=4, do_sample=False)
    assert (output[0, 37:].tolist(), past.num_cached) == (request.tokens, 36)
    assert_drains(engine)


def test_a_hit_has_the_bits_of_a_miss():
    """Of one row in a step: the model's own products have the same sizes then."""
    model = deepseek()
    latent(model)
    engine = engine_for(model, num_pages=64, page_size=16)
    [prompt] = random_prompts(40)
    with torch.inference_mode():
        lease = engine.acquire(prompt[:1])
        for token in [*prompt[1:], None]:
            with engine.step([lease]) as step:
                cold = forward(model, step)[0]
            if token is not None:
                lease.extend([token])
        lease.release()
        lease = engine.acquire(prompt)
        assert lease.num_cached == 39
        with engine.step([lease]) as step:
            assert torch.equal(forward(model, step)[0], cold)


def test_nothing_is_copied_and_the_model_can_still_be_converted_and_copied():
    model = deepseek()
    before = {name: (p.data_ptr(), p.shape) for name, p in model.named_parameters()}
    latent(model)
    assert before == {name: (p.data_ptr(), p.shape) for name, p in model.named_parameters()}
    [prompt] = random_prompts(20)
    other = copy.deepcopy(model)
    expected = stock_tokens(deepseek(), prompt, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert answer(other, prompt) == expected, "a copy has weights of its own"
    half = other.to(torch.bfloat16)
    engine = engine_for(half, num_pages=32)
    assert (engine.layers[0], engine.dtype) == (ROW, torch.bfloat16)
    assert len(answer(half, prompt)) == 4


def test_absorbed_products_are_the_expanded_ones():
    """In float64, head by head: scores and values."""
    module = deepseek().model.layers[0].self_attn.double()
    c, r = torch.randn(1, 1, 7, 32).double(), torch.randn(1, 1, 7, 8).double()
    k, v = type(module).expand_kv(module, c, r)
    q = torch.randn(5, 4, 24).double()
    rows = torch.cat([c, r], -1)[0, 0]
    expected = torch.einsum("qhd,hkd->qhk", q, k[0])
    torch.testing.assert_close(torch.einsum("qhd,kd->qhk", latent_queries(module, q), rows), expected)
    weights = torch.rand(5, 4, 7).double()
    means = torch.einsum("qhk,kd->qhd", weights, c[0, 0])
    torch.testing.assert_close(head_values(module, means), torch.einsum("qhk,hkd->qhd", weights, v[0]))


@pytest.mark.parametrize("heads_at_once", [1, 3, 4])
def test_where_16_bits_multiply_slowly_products_are_widened(heads_at_once, monkeypatch):
    """Some heads at a time; as exact as bfloat16 is."""
    module = deepseek().model.layers[0].self_attn.to(torch.bfloat16)
    q, means = torch.randn(5, 4, 24).bfloat16(), torch.randn(5, 4, 32).bfloat16()
    expected = [f(module.double(), x.double()) for f, x in ((latent_queries, q), (head_values, means))]
    module.to(torch.bfloat16)
    plain, seen = torch.bmm, []

    def bmm(one, other):
        seen.append((one.dtype, other.dtype, len(other)))
        return plain(one, other)

    monkeypatch.setattr(torch, "bmm", bmm)
    monkeypatch.setattr(absorbed, "multiplies", lambda dtype: False)
    monkeypatch.setattr(absorbed, "WIDENED_BYTES", heads_at_once * 24 * 32 * 4)
    for f, x, exact in ((latent_queries, q, expected[0]), (head_values, means, expected[1])):
        found = f(module, x)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-3)
    assert all(one == other == torch.float32 for one, other, _ in seen)
    assert sum(heads for *_, heads in seen) == 8


# ---- refusals ----


def without(part):
    def change(model):
        delattr(model.model.layers[1].self_attn, part)

    return change


def with_projection(make):
    def change(model):
        attention = model.model.layers[1].self_attn
        attention.kv_b_proj = make(attention.kv_b_proj)

    return change


class Quantized(torch.nn.Linear):
    pass


def subclass(old):
    new = Quantized(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    return new


def biased(old):
    return torch.nn.Linear(old.in_features, old.out_features)


def hooked(old):
    old.register_forward_hook(lambda module, args, out: out * 2)
    return old


def scaled(model):
    """Keys that are more than the latents and the rotated part say."""
    attention = model.model.layers[1].self_attn
    original = type(attention)

    class Other(original):
        def expand_kv(self, kv_nope, k_rot):
            k, v = super().expand_kv(kv_nope, k_rot)
            return torch.nn.functional.normalize(k, dim=-1), v

    attention.__class__ = Other


def late(model):
    """The same, and only from position 300 on."""
    attention = model.model.layers[1].self_attn
    original = type(attention)

    class Late(original):
        def forward(self, hidden_states, position_ids=None, **kwargs):
            self.now = position_ids[0] >= 300
            return super().forward(hidden_states, position_ids=position_ids, **kwargs)

        def expand_kv(self, kv_nope, k_rot):
            k, v = super().expand_kv(kv_nope, k_rot)
            return k, torch.where(self.now[:, None], v * 1.5, v)

    attention.__class__ = Late


REFUSED = {
    "qk_nope_head_dim": (without("qk_nope_head_dim"), r"model.layers.1.self_attn of .* without qk_nope_head_dim"),
    "a subclass": (with_projection(subclass), r"kv_b_proj in model.layers.1.self_attn .* is a Quantized: .* nn.Linear"),
    "a bias": (with_projection(biased), "has a bias: .* leave latent"),
    "a hook": (with_projection(hooked), "has forward hooks, which latent"),
    "keys normalized": (scaled, r"layers.1.self_attn of .* computes something else over latents .* stores its K and V"),
    "late values": (late, r"layers.1.self_attn of .* computes something else over latents"),
    "training": (lambda model: model.train(), "is in training mode: call model.eval"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rewritten_is_refused_and_left_as_it_was(name):
    change, message = REFUSED[name]
    model = deepseek()
    change(model)
    with pytest.raises(InvalidArgument, match=message):
        latent(model)
    assert not any("expand_kv" in vars(module) for module in model.modules())
    assert model.config._attn_implementation == "eager"
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_models_without_latent_attention_are_refused():
    with pytest.raises(InvalidArgument, match="LlamaForCausalLM has no latent attention .* leave latent"):
        latent(tiny())


def test_older_transformers_are_refused(monkeypatch):
    model = deepseek()
    for base in type(model.model.layers[0].self_attn).__mro__:
        if "expand_kv" in vars(base):
            monkeypatch.delattr(base, "expand_kv")
    with pytest.raises(InvalidArgument, match=r"without expand_kv \(transformers 5.24 or later\)"):
        latent(model)


def test_twice_and_with_others():
    model = deepseek()
    latent(model)
    with pytest.raises(InvalidArgument, match="stores latents already: call latent.. once"):
        latent(model)
    with pytest.raises(InvalidArgument, match="optimize"):
        optimize(model)
    with pytest.raises(InvalidArgument, match=r"a latent layer is not stored as int8.*fp8\(scale, scale\)"):
        engine_for(model, num_pages=32, kv_format="int8")
    assert isinstance(model.model.layers[0].self_attn.expand_kv, types.MethodType)


def test_pages_of_eight_bits():
    model = deepseek()
    latent(model)
    engine = engine_for(model, num_pages=32, kv_format="fp8")
    assert engine.pool.page_bytes == 3 * 16 * 40
    with Generator(model, engine) as generator:
        request = generator.submit(random_prompts(20)[0], max_new_tokens=4)
        generator.run()
    assert len(request.tokens) == 4
