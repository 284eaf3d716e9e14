"""Latent layers: one row a token, whose first numbers are the value. Oracle, same bits, storage, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import radixkv
from radixkv import _core
from radixkv.attention.cascade import OFF
from radixkv.capacity import bytes_per_page, bytes_per_token, expanded, fits_latent, known_models
from radixkv.errors import InvalidArgument
from radixkv.formats import FORMATS, LayerFormat, RowFormat, fp8
from radixkv.pool import KVPool
from radixkv.shape import LayerShape
from tests.attention.cascade_helpers import Forest, random_forest
from tests.attention.helpers import ISAS, Heads, Options, Pool, Request, Tokens, as_stored, error, random_sequence
from tests.attention.helpers import one_torch_thread as one_torch_thread
from tests.attention.test_attention_identity import assert_same_bits, random_request, references
from tests.attention.test_cascade_native import EAGER, Layer
from tests.attention.test_cascade_native import assert_same_bits as assert_all_same_bits

pytestmark = pytest.mark.usefixtures("one_torch_thread")
SCALE = 192**-0.5  # of DeepSeek's heads
PLAIN = Options(SCALE)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DEEPSEEK = Heads(16, 1, 576, latent=512)
SMALL = [Heads(4, 1, 24, latent=16), Heads(7, 1, 40, latent=24), Heads(20, 1, 96, latent=64)]
CPU = torch.device("cpu")
each_isa = pytest.mark.parametrize("isa", ISAS)
each_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d).removeprefix("torch."))


def batch_of(lengths: list[tuple[int, int]], heads: Heads, dtype: torch.dtype, seed: int = 0) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    return [Request(random_sequence(generator, n, heads, dtype), n, rows) for n, rows in lengths]


# ---- the oracle ----


@each_isa
@each_dtype
@pytest.mark.parametrize("group", [16, 20, 128])
def test_deepseeks_rows(isa: str, dtype: torch.dtype, group: int) -> None:
    """576 and 512: prefill, extend and decode together, over the edges of tiles and chunks, on two threads."""
    pool = Pool(Heads(group, 1, 576, latent=512), dtype, num_pages=80, isa=isa, num_threads=2)
    requests = batch_of([(70, 70), (130, 5), (65, 1), (1, 1), (530, 2)], pool.heads, dtype)
    got = pool.attend(requests, np.random.default_rng(0), PLAIN)
    assert error(got, requests, PLAIN) <= TOLERANCE[dtype]


@each_isa
@each_dtype
def test_every_share_of_a_row(isa: str, dtype: torch.dtype) -> None:
    """Values from 8 numbers to the whole key, with windows, caps, chunks and sinks."""
    sinks = torch.linspace(-2, 4, 5)
    for k_dim, v_dim in ((16, 8), (24, 16), (40, 24), (96, 64), (64, 64), (288, 256), (320, 200)):
        pool = Pool(Heads(5, 1, k_dim, latent=v_dim), dtype, isa=isa)
        requests = batch_of([(90, 30), (150, 1), (65, 4)], pool.heads, dtype, k_dim)
        for options in (Options(0.1), Options(0.1, 70), Options(0.1, -1, 5.0), Options(0.1, -1, 0.0, 60)):
            got = pool.attend(requests, np.random.default_rng(0), options, sinks)
            slack = 2.0  # rows that see few keys are as large as values are, up to 5
            assert error(got, requests, options, sinks) <= TOLERANCE[dtype] * slack, (k_dim, v_dim, options)


@each_isa
def test_the_absorbed_form_is_the_expanded_one(isa: str) -> None:
    """In float64: up-projections in the queries and outputs give what K and V of every head give."""
    generator = torch.Generator().manual_seed(1)
    heads, nope, rope, rank, v_dim, length = 8, 16, 8, 32, 24, 90
    latents = torch.randn(length, rank, generator=generator).double()
    rotated = torch.randn(length, rope, generator=generator).double()
    up_k = torch.randn(heads, nope, rank, generator=generator).double() / rank**0.5
    up_v = torch.randn(heads, v_dim, rank, generator=generator).double() / rank**0.5
    q = torch.randn(length, heads, nope + rope, generator=generator).double()
    k = torch.cat([torch.einsum("hnc,tc->thn", up_k, latents), rotated[:, None].expand(-1, heads, -1)], -1)
    scale = (nope + rope) ** -0.5
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores.masked_fill_(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    expected = torch.einsum("hqk,khv->qhv", scores.softmax(-1), torch.einsum("hvc,tc->thv", up_v, latents))

    pool = Pool(Heads(heads, 1, rank + rope, latent=rank), isa=isa)
    rows = torch.cat([latents, rotated], -1).float()[:, None]
    absorbed = torch.cat([torch.einsum("qhn,hnc->qhc", q[..., :nope], up_k), q[..., nope:]], -1).float()
    request = Request(Tokens(absorbed, rows, rows[..., :rank]), length, 40)
    (got,) = pool.attend([request], np.random.default_rng(0), Options(scale))
    got_values = torch.einsum("qhc,hvc->qhv", got.double(), up_v)
    assert (got_values - expected[-40:]).abs().max() <= 3e-6


# ---- the same bits ----


@each_isa
@each_dtype
def test_random_splits(isa: str, dtype: torch.dtype) -> None:
    """Whatever part was cached, the page size, the pages, the batch and the threads."""
    rng = np.random.default_rng(len(isa))
    for heads in (SMALL[1], DEEPSEEK):
        generator = torch.Generator().manual_seed(7)
        length = 700 if heads is not DEEPSEEK else 150
        tokens = [random_sequence(generator, length, heads, dtype) for _ in range(2)]
        pools = [
            Pool(heads, dtype, num_pages=2 * -(-length // size), page_size=size, num_threads=threads, isa=isa)
            for size in (1, 16, 64, 100)
            for threads in (1, 3)
        ]
        want = references(tokens, pools[-1], PLAIN)
        for _ in range(30 if heads is not DEEPSEEK else 8):
            pool = pools[rng.integers(len(pools))]
            requests = [random_request(rng, i, tokens[i]) for i in range(2)]
            for i, got in enumerate(pool.attend(requests, rng, PLAIN)):
                assert_same_bits(got, want[i], requests[i], pool)


@each_isa
@each_dtype
def test_cascade_changes_no_bit(isa: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(len(isa))
    used = 0
    for seed in range(12):
        page_size = int(rng.choice([1, 16, 64, 100]))
        forest = random_forest(
            rng, requests=4, page_size=page_size, max_run=700 // page_size + 1, max_private=60, row_choices=[1, 1, 4]
        )
        layer = Layer(forest, SMALL[seed % 3], dtype, seed)
        options = [Options(0.1), Options(0.1, 600, 5.0)]
        want = layer.attend(layer.backend(OFF, 1, isa), options)
        for threads in (1, 3):
            backend = layer.backend(EAGER, threads, isa)
            for got, expected in zip(layer.attend(backend, options), want, strict=True):
                assert_all_same_bits(got, expected, (seed, threads))
        used += sum(s.used for s in backend.cascade.segments)
    assert used > 5


@each_isa
def test_many_rows_of_many_heads(isa: str) -> None:
    """128 query heads: a request's four new rows are more than one block, and so are the users of a segment."""
    heads = Heads(128, 1, 40, latent=32)
    pages = [[*range(40), 40 + i] for i in range(6)]
    layer = Layer(Forest(pages, [41 * 16 - 2] * 6, [4, 1, 3, 2, 4, 4], 16), heads, torch.bfloat16, 0)
    (want,) = layer.attend(layer.backend(OFF, 1, isa), [PLAIN])
    for threads in (1, 2):
        (got,) = layer.attend(layer.backend(EAGER, threads, isa), [PLAIN])
        assert_all_same_bits(got, want, threads)


@each_dtype
def test_instruction_sets_agree(dtype: torch.dtype) -> None:
    """Portable against the others: to rounding, as for any layer."""
    requests = batch_of([(150, 20), (90, 1)], DEEPSEEK, dtype)
    outs = {
        isa: Pool(DEEPSEEK, dtype, isa=isa).attend(requests, np.random.default_rng(0), PLAIN) for isa in _core.isas()
    }
    for got in outs.values():
        for rows, expected in zip(got, outs["portable"], strict=True):
            assert (rows.float() - expected.float()).abs().max() <= TOLERANCE[dtype]


# ---- storage ----


def test_nothing_is_stored_twice() -> None:
    shapes = [LayerShape(16, 1, 576, 512, latent=True), LayerShape(4, 2, 64), LayerShape(16, 1, 576, 512, latent=True)]
    for name in ("bf16", "fp32"):
        stored = FORMATS[name]
        pool = KVPool(shapes, [stored] * 3, 5, 16, CPU)
        size = 4 if name == "fp32" else 2
        assert pool.page_bytes == 16 * size * (2 * 576 + 2 * 2 * 64)
        assert pool.page_bytes == sum(stored.page_bytes(16, shape) for shape in shapes)
        assert stored.token_bytes(shapes[0]) == 576 * size
        assert pool.nbytes == sum(block.nbytes for block in pool._blocks.values())
        layer = pool.layers[0]
        assert layer.v.data_ptr() == layer.k.data_ptr()
        assert layer.v.shape == (5, 16, 1, 512)
        assert layer.k.shape == (5, 16, 1, 576)


def test_a_pool_of_latents_and_a_plan_agree():
    """DeepSeek-V3's 61 layers: the pool's pages, the formula, and what K and V of its heads would take."""
    model = known_models()["deepseek-v3"]
    shape = LayerShape(128, 1, 576, 512, latent=True)
    pool = KVPool([shape] * 61, [FORMATS["bf16"]] * 61, 1, 16, CPU)
    assert pool.page_bytes == bytes_per_page(model, FORMATS["bf16"], 16) == 16 * 70_272
    assert bytes_per_token(model, FORMATS["bf16"]) == 61 * FORMATS["bf16"].token_bytes(shape) == 70_272
    whole = expanded(model)
    assert (
        bytes_per_token(whole, FORMATS["bf16"])
        == 61 * FORMATS["bf16"].token_bytes(LayerShape(128, 128, 192, 128))
        == 4_997_120
    )
    assert expanded(known_models()["llama-3-8b"]) is None
    assert [name for name, f in FORMATS.items() if fits_latent(model, f)] == ["fp32", "bf16", "fp16", "fp8"]


def test_append_writes_the_row_and_no_other() -> None:
    pool = Pool(SMALL[1], torch.bfloat16)
    requests = batch_of([(300, 200), (50, 1)], pool.heads, torch.bfloat16)
    table = pool.load(requests, np.random.default_rng(1))
    before = pool.k.clone()
    pool.backend.plan(table)
    rows = torch.randn(201, 1, 40).bfloat16()
    pool.backend.append(0, rows, rows[..., :24])
    page, slot = table.slots // pool.page_size, table.slots % pool.page_size
    assert torch.equal(pool.k[page, slot], rows)
    pool.k[page, slot] = before[page, slot]
    assert torch.equal(pool.k.nan_to_num(), before.nan_to_num())


def test_pages_are_copied_read_and_written_whole() -> None:
    shapes = [LayerShape(4, 1, 24, 16, latent=True), LayerShape(4, 2, 16)]
    pool = KVPool(shapes, [FORMATS["fp32"]] * 2, 6, 4, CPU)
    for block in pool._blocks.values():
        block.copy_(torch.randint(0, 120, block.shape, dtype=torch.uint8))
    pages = np.array([4, 1], np.int32)
    data = np.empty((2, pool.page_bytes), np.uint8)
    pool.read_pages(pages, data)
    assert data[0, : 4 * 24 * 4].tobytes() == pool.layers[0].k[4].numpy().tobytes()
    pool.write_pages(np.array([0, 2], np.int32), data)
    pool.copy_pages(np.array([4], np.int32), np.array([5], np.int32))
    for layer in pool.layers:
        for kv in (layer.k, layer.v):
            assert torch.equal(kv[0], kv[4])
            assert torch.equal(kv[2], kv[1])
            assert torch.equal(kv[5], kv[4])


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eight_bit_floats_of_one_scale(isa: str, dtype: torch.dtype) -> None:
    stored = fp8(0.0625, 0.0625)
    pool = Pool(DEEPSEEK, dtype, isa=isa, kv_format=stored)
    requests = batch_of([(130, 70), (90, 1)], DEEPSEEK, dtype)
    got = pool.attend(requests, np.random.default_rng(0), PLAIN)
    kept = [Request(as_stored(r.sequence, pool.layer), r.length, r.rows) for r in requests]
    assert error(got, kept, PLAIN) <= TOLERANCE[dtype]
    k, v = pool.backend.stored(0)
    assert (k.rows, v.rows) == (71, 0)


# ---- leases ----


def test_hit_fork_drop_and_copies_through_an_engine() -> None:
    """The same bits whether a prefix was cached, taken over in a part of a page, forked, or its pages dropped."""
    shapes = [LayerShape(6, 1, 24, 16, latent=True), LayerShape(6, 1, 40, 32, latent=True)]
    embedding = torch.randn(50, 6, 40, generator=torch.Generator().manual_seed(0))

    def run(engine: radixkv.Engine, leases: list[radixkv.Lease], window: int = -1) -> torch.Tensor:
        with engine.step(leases) as step:
            x = embedding[step.input_ids] * (1 + step.positions[:, None, None] / 999)
            outs = []
            for i, shape in enumerate(shapes):
                q, rows = x[..., : shape.k_dim], x[:, :1, : shape.k_dim]
                outs.append(step.attend(i, q, rows, rows[..., : shape.v_dim], sm_scale=0.2, window_left=window))
            return torch.cat([out.flatten(1) for out in outs], 1)

    def engine() -> radixkv.Engine:
        return radixkv.Engine(layers=shapes, page_size=16, num_pages=200, dtype=torch.float32)

    prompt = torch.randint(0, 50, (1300,), generator=torch.Generator().manual_seed(1)).tolist()
    with engine() as cold, engine() as warm:
        want = run(cold, [cold.acquire(prompt)])
        first = warm.acquire(prompt[:1001])  # ends inside a page: the next lease copies it
        run(warm, [first])
        first.release()
        lease = warm.acquire(prompt)
        assert lease.num_cached == 1001
        got = run(warm, [lease])
        assert torch.equal(got, want[1001:])
        child = lease.fork()
        for each in (lease, child):
            each.extend([3])
        both = run(warm, [lease, child])
        assert torch.equal(both[0], both[1])
        child.release()
        full, windowed = engine(), engine()
        kept, dropped = full.acquire(prompt), windowed.acquire(prompt)
        run(full, [kept], 100), run(windowed, [dropped], 100)
        assert windowed.drop(dropped, 100) > 0
        for each in (kept, dropped):
            each.extend([3])
        assert torch.equal(run(full, [kept], 100), run(windowed, [dropped], 100))


# ---- refusals ----


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((8, 2, 64, 32), "a latent layer has 1 kv head, .* got 2 kv heads, k_dim 64 and v_dim 32"),
        ((8, 1, 64, 128), "got 1 kv heads, k_dim 64 and v_dim 128"),
    ],
)
def test_shapes_that_no_latent_layer_has(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        LayerShape(*shape, latent=True)
    with pytest.raises(InvalidArgument, match="latent must be True or False; got 1"):
        LayerShape(8, 1, 64, 32, latent=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "stored",
    [
        *(FORMATS[name] for name in ("int8", "k8v4", "int4", "fp8_rotated")),
        fp8(0.5, 0.25),
        LayerFormat(RowFormat("float8_e4m3fn"), RowFormat("bfloat16")),
        LayerFormat(RowFormat("float8_e4m3fn"), RowFormat("float8_e4m3fn"), (0.5,) * 24),
    ],
    ids=str,
)
def test_formats_that_no_latent_layer_has(stored: LayerFormat) -> None:
    shapes = [LayerShape(4, 2, 32), LayerShape(4, 1, 24, 16, latent=True)]
    with pytest.raises(InvalidArgument, match=r"a latent layer is not stored as .* first 16 numbers .* fp8\(s"):
        radixkv.Engine(layers=shapes, num_pages=4, kv_format=[None, stored])


def test_the_core_refuses_rows_that_are_no_value() -> None:
    """What the checks above would have to miss."""
    pages = torch.zeros(4, 16 * 64, dtype=torch.uint8)

    def plan(v_dim: int, **changes: object) -> None:
        cache = {
            "address": pages.data_ptr(), "dtype": "float8_e4m3fn", "num_heads": 1, "dim": 64, "scale": 1.0,
            "rotated": False, "page_bytes": 1024, "scales": 0, "centre": 0, "usual_scale": 1.0,
        }  # fmt: skip
        layer = _core.LayerKV.latent(num_qo_heads=4, k=_core.LayerCache(**(cache | changes)), v_dim=v_dim)
        _core.AttentionPlan([layer], "float32", 4, 16, 1)

    plan(48)
    with pytest.raises(InvalidArgument, match="layer 0: v_dim is 72: a latent value is a part of its key, of 64"):
        plan(72)
    for changes in ({"rotated": True}, {"centre": pages.data_ptr()}):
        with pytest.raises(InvalidArgument, match="a latent row is rotated or has a centre: its first 48 numbers"):
            plan(48, **changes)


def test_a_value_of_its_own_and_a_missing_scale_are_refused() -> None:
    heads = SMALL[0]
    pool = Pool(heads)
    pool.backend.plan(pool.load(batch_of([(3, 3)], heads, torch.float32), np.random.default_rng(0)))
    rows = torch.randn(3, 1, 24)
    before = pool.k.clone()
    for v in (rows[..., :16].clone(), rows[..., 8:]):
        with pytest.raises(InvalidArgument, match=r"v of a latent layer has memory of its own: .* pass k\[..., :16\]"):
            pool.backend.append(0, rows, v)
    assert torch.equal(pool.k.nan_to_num(), before.nan_to_num())
    pool.backend.append(0, rows, rows[..., :16])
    with pytest.raises(InvalidArgument, match="sm_scale is None in a latent layer, whose rows of 24 are no head's"):
        pool.backend.run(0, torch.randn(3, 4, 24), torch.empty(3, 4, 16))
    pool.backend.run(0, torch.randn(3, 4, 24), torch.empty(3, 4, 16), PLAIN)
