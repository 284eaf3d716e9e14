"""Which formats a model takes, measured on a text; plans in files; audits."""

from __future__ import annotations

import json
import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import radixkv  # noqa: E402
from radixkv.errors import InvalidArgument  # noqa: E402
from radixkv.formats import FORMATS  # noqa: E402
from radixkv.hf import Generator, audit, engine_for, kv_check  # noqa: E402
from radixkv.hf.adapter import probe  # noqa: E402
from radixkv.hf.kv_measure import Reference  # noqa: E402
from radixkv.kv_plan import KvPlan  # noqa: E402
from radixkv.observe.loss_svg import loss_svg  # noqa: E402
from tests.hf.helpers import build, random_prompts, tiny  # noqa: E402

TOKENS = random_prompts(160, seed=11)[0]
SHARP = {"num_hidden_layers": 3, "head_dim": 32, "initializer_range": 0.25, "attention_bias": True}


def sharp_model():
    """Attention that looks at some keys more than at others, so that errors of keys show."""
    return build("LlamaConfig", "LlamaForCausalLM", SHARP)


def with_large_constant(model, layer):
    """What Qwen2.5 has in some layers: a bias of K many times as large as K, in channels that RoPE turns fast."""
    attention = model.model.layers[layer].self_attn
    with torch.no_grad():
        bias = attention.k_proj.bias.view(-1, 32)
        bias[:, [0, 16]] = 3000.0
        attention.q_proj.weight.view(-1, 32, attention.q_proj.in_features)[:, [0, 16]] = 0.0
        attention.q_proj.bias.view(-1, 32)[:, [0, 16]] = 0.0
    return model


def test_the_loss_of_the_models_own_dtype_is_nothing():
    model = sharp_model()
    reference = Reference(model, probe(model), TOKENS)
    loss, _ = reference.loss([None] * 3)
    assert (loss.tokens, loss.kl_mean, loss.kl_p99, loss.top1, loss.greedy_prefix, loss.perplexity) == (
        80, 0.0, 0.0, 1.0, 1.0, 0.0
    )  # fmt: skip


def test_losses_are_what_their_definitions_say():
    """Against a model of other distributions, in float64."""
    model = sharp_model()
    reference = Reference(model, probe(model), TOKENS)
    other = torch.randn(80, reference.log_probs.shape[1], generator=torch.Generator().manual_seed(0)) / 4
    other += reference.log_probs
    loss = reference.loss_of(other)
    p, q = reference.log_probs.double(), other.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    assert loss.kl_mean == pytest.approx(kl.mean().item(), rel=1e-4)
    assert loss.kl_p99 == pytest.approx(kl.quantile(0.99).item(), rel=1e-4)
    same = (p.argmax(-1) == q.argmax(-1)).tolist()
    assert 0 < loss.top1 == sum(same) / 80 < 1
    prefixes = [[*run, False].index(False) / len(run) for run in (same[:64], same[64:])]
    assert loss.greedy_prefix == pytest.approx(sum(prefixes) / 2)
    next_tokens = torch.tensor(TOKENS[81:])[:, None]
    ratio = (p[:-1].gather(1, next_tokens).mean() - q[:-1].gather(1, next_tokens).mean()).exp()
    assert loss.perplexity == pytest.approx(ratio.item() - 1, rel=1e-4)


def test_the_cheapest_plan_within_the_bound():
    model = sharp_model()
    calls = []
    free = kv_check(model, TOKENS, 100.0, progress=lambda done, expected: calls.append((done, expected)))
    assert free.chosen.formats == ("int4",) * 3, "everything is allowed"
    assert [done for done, _ in calls] == list(range(1, len(calls) + 1))
    assert all(done <= expected for done, expected in calls)
    none = kv_check(model, TOKENS, 0.0)
    assert none.chosen.formats == ("fp32",) * 3, "nothing is"
    assert none.plan.formats == (None,) * 3
    by_bytes = [tried.token_bytes for tried in free.tried]
    assert by_bytes == sorted(by_bytes)
    uniform = {tried.formats[0]: tried.loss.kl_mean for tried in free.tried if len(set(tried.formats)) == 1}
    assert uniform["int8"] < uniform["k8v4"] < uniform["int4"]
    bound = uniform["k8v4"] / 2
    some = kv_check(model, TOKENS, bound)
    assert some.chosen.loss.kl_mean <= bound
    assert some.chosen.token_bytes < none.chosen.token_bytes
    cheaper = [t for t in some.tried if t.token_bytes < some.chosen.token_bytes]
    assert all(t.loss.kl_mean > bound for t in cheaper)


def test_a_layer_with_a_large_constant_in_its_keys_stays_in_the_models_own_dtype():
    model = with_large_constant(sharp_model(), 1)
    good = kv_check(sharp_model(), TOKENS, 0.01).chosen.formats
    assert "fp32" not in good
    found = kv_check(model, TOKENS, 0.01)
    assert found.chosen.formats[1] == "fp32"
    assert "fp32" not in (found.chosen.formats[0], found.chosen.formats[2])
    assert found.profiles[1].large_channel > 100 > found.profiles[0].large_channel


def test_a_plan_is_kept_in_a_file_and_fits_its_model_alone(tmp_path):
    model = sharp_model()
    plan = kv_check(model, TOKENS, 0.01).plan
    path = tmp_path / "plan.json"
    plan.save(path)
    assert KvPlan.load(path) == plan
    json.loads(path.read_text(), parse_constant=pytest.fail)  # no Infinity: other readers know none
    engine = engine_for(model, num_pages=32, kv_format=KvPlan.load(path))
    assert [kv.format for kv in engine.pool.layers] == list(plan.formats)
    with Generator(model, engine) as generator:
        generator.submit(TOKENS[:40], max_new_tokens=4)
        generator.run()
    k, _ = engine.attention.stored(0)
    assert (k.rows > 0, k.unusual) == (True, 0), "the text that it was measured on"
    with pytest.raises(InvalidArgument, match="the plan is for 3 layers, the model has"):
        engine_for(
            build("LlamaConfig", "LlamaForCausalLM", SHARP | {"num_hidden_layers": 2}), num_pages=4, kv_format=plan
        )
    with pytest.raises(InvalidArgument, match="the plan is for another model: its layer 0 is"):
        engine_for(build("LlamaConfig", "LlamaForCausalLM", SHARP | {"head_dim": 16}), num_pages=4, kv_format=plan)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no plan of radixkv kv-check: JSONDecodeError"),
        ("[]", "is no plan of radixkv kv-check: TypeError"),
        ('{"radixkv_kv_plan": 9}', "is a plan of version 9: this release reads 1"),
        (
            '{"radixkv_kv_plan": 1, "measured": {}, "layers": [{"k_dim": 8}]}',
            "is no plan of radixkv kv-check: KeyError",
        ),
    ],
)
def test_files_that_are_no_plans(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match=message):
        KvPlan.load(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": [1, 2, 3]}, "3 tokens of text: give 64 or more"),
        ({"max_kl": -1.0}, "max_kl is -1.0"),
        ({"max_kl": math.nan}, "max_kl is nan"),
        ({"formats": ["int3"]}, r"formats to try: \['int3'\]: give some of fp8, fp8_rotated, int8, k8v4, int4"),
        ({"formats": []}, "formats to try"),
    ],
)
def test_checks_that_are_refused(arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        kv_check(tiny(), **{"tokens": TOKENS, "max_kl": 0.1, **arguments})


def test_an_audit_says_what_an_engines_formats_lose():
    model = sharp_model()
    losses = {}
    for name in (None, "int8", "int4"):
        engine = engine_for(model, num_pages=32, kv_format=name)
        with Generator(model, engine) as generator:
            generator.submit(TOKENS[:100], max_new_tokens=1)
            generator.run()
        with engine.acquire(TOKENS[:100]) as lease:
            losses[name] = audit(model, engine, lease)
    with engine.acquire([1, 2, 3]) as lease, pytest.raises(InvalidArgument, match="the lease has 0 written tokens"):
        audit(model, engine, lease)
    assert losses[None].kl_mean == 0.0
    assert 0.0 < losses["int8"].kl_mean < losses["int4"].kl_mean
    with engine.acquire(TOKENS[:100]) as lease, pytest.raises(InvalidArgument, match="for other layers"):
        audit(tiny(), engine, lease)


def test_a_model_answers_alike_in_8_bits_on_a_hit_a_miss_and_in_company():
    """Of three dtypes: a pool of 8 bits serves any of them."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = sharp_model().to(dtype)
        for name in ("int8", "k8v4", "int4"):
            answers = []
            for company in ([], random_prompts(30, 50)):
                engine = engine_for(model, num_pages=64, page_size=4, kv_format=name)
                with Generator(model, engine) as generator:
                    for _ in range(2):
                        requests = [generator.submit(prompt, max_new_tokens=8) for prompt in (TOKENS[:60], *company)]
                        generator.run()
                        answers.append(requests[0].tokens)
            assert len({tuple(answer) for answer in answers}) == 1, (dtype, name)


def test_the_picture_has_a_point_for_each_plan():
    points = [("int4", 100, 0.5, False), ("int8", 200, 1e-4, True), ("fp32", 400, 0.0, False)]
    picture = loss_svg("a model <", points, 0.001)
    assert picture.count("<circle") == 3
    assert picture.count('class="chosen"') == 1
    assert "a model &lt;" in picture
    assert 'class="bound"' in picture
    assert 'class="bound"' not in loss_svg("a model", points, 0.0)


def test_formats_of_the_engine_are_part_of_its_name():
    engine = radixkv.Engine(
        num_layers=2, num_qo_heads=2, num_kv_heads=2, head_dim=16, num_pages=2, dtype=torch.float32, kv_format="k8v4"
    )
    assert "as k8v4" in repr(engine)
    assert engine.pool.layers[0].format == FORMATS["k8v4"]
