"""Engine and Step: answers against a dense oracle, bit-identity of hit and miss, transactions, misuse."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import radixkv  # noqa: E402
from radixkv.formats import LayerFormat, RowFormat, fp8, layer_formats  # noqa: E402
from radixkv.memory import parse_bytes  # noqa: E402
from radixkv.pool import KVPool, copy_batched  # noqa: E402
from radixkv.shape import LayerShape  # noqa: E402

LAYERS, HEADS, KV_HEADS, DIM, VOCAB = 3, 4, 2, 16, 50
torch.manual_seed(0)
EMBEDDING = torch.randn(VOCAB, HEADS, DIM)
WEIGHT = torch.randn(LAYERS, 3, HEADS, DIM)
FP8_STORAGE = {"kv_format": fp8(k_scale=0.1, v_scale=0.3)}
STORAGES = [{}, FP8_STORAGE, *({"kv_format": name} for name in ("fp8_rotated", "int8", "k8v4", "int4"))]


def make_engine(num_pages=64, page_size=4, dtype=torch.float32, **options):
    return radixkv.Engine(
        num_layers=LAYERS, num_qo_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM,
        page_size=page_size, num_pages=num_pages, dtype=dtype, **options,
    )  # fmt: skip


def qkv(x, layer):
    """A toy model whose rows do not see each other outside of attention, in arithmetic that is exact per element."""
    q, k, v = (x * WEIGHT[layer, i].to(x.dtype) for i in range(3))
    return q, k[:, :KV_HEADS], v[:, :KV_HEADS]


def embed(tokens, positions, dtype):
    return (EMBEDDING[tokens] * (1 + positions[:, None, None] / 64)).to(dtype)


def forward(step, dtype=torch.float32):
    x = embed(step.input_ids, step.positions, dtype)
    for layer in range(LAYERS):
        x = x + step.attend(layer, *qkv(x, layer))
    return x


def oracle(tokens):
    """The toy model over the whole sequence, dense, in float64."""
    x = embed(torch.tensor(tokens), torch.arange(len(tokens)), torch.float64)
    for layer in range(LAYERS):
        q, k, v = qkv(x, layer)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        logits = torch.einsum("nhd,mhd->hnm", q, k) * DIM**-0.5
        logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), float("-inf"))
        x = x + torch.einsum("hnm,mhd->nhd", logits.softmax(-1), v)
    return x


def random_tokens(rng, n):
    return rng.integers(0, VOCAB, n).tolist()


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_answers_match_a_dense_oracle_in_mixed_batches(page_size):
    engine = make_engine(num_pages=600 // page_size, page_size=page_size)
    rng = np.random.default_rng(page_size)
    shared = random_tokens(rng, 37)
    leases = []
    for turn in range(6):
        leases.append(engine.acquire(shared[: rng.integers(1, 38)] + random_tokens(rng, int(rng.integers(1, 30)))))
        with engine.step(leases) as step:
            out = forward(step)
        for lease, last in zip(leases, step.last_rows, strict=True):
            expected = oracle(lease.tokens.tolist())[-1]
            assert (out[last].double() - expected).abs().max() < 2e-5 * max(1, expected.abs().max())
            lease.extend(random_tokens(rng, int(rng.integers(1, 4))))
        if turn % 2:
            leases.pop(0).release()
        engine.cache.check()
    assert engine.cache.stats().hit_tokens > 0


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: str(s.get("kv_format", ""))[:12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hit_never_changes_the_answer(dtype, storage):
    """Bit-identical last rows: fresh engine, warm engine with any cached part, thrashing engine, any batch."""
    rng = np.random.default_rng(1)
    base = random_tokens(rng, 90)

    def answer(engine, tokens, company=()):
        leases = [engine.acquire(t) for t in (*company, tokens)]
        with engine.step(leases) as step:
            out = forward(step, dtype)
        row = out[step.last_rows[-1]].clone()
        cached = leases[-1].num_cached
        for lease in leases:
            lease.release()
        return row, cached

    options = {"dtype": dtype, **storage}
    warm = make_engine(num_pages=400, page_size=8, **options)
    thrashing = make_engine(num_pages=20, page_size=8, **options)
    hits = 0
    for _ in range(40):
        tokens = base[: rng.integers(0, 90)] + random_tokens(rng, int(rng.integers(1, 40)))
        cold, cached = answer(make_engine(page_size=int(rng.integers(1, 20)), num_pages=200, **options), tokens)
        assert cached == 0
        company = [[*base[: rng.integers(1, 30)], 1] for _ in range(rng.integers(0, 3))]
        for engine, others in ((warm, company), (thrashing, ())):
            row, cached = answer(engine, tokens, others)
            hits += cached
            assert torch.equal(row, cold)
    assert hits > 500


def test_8_bits_halve_the_pool_and_stay_near_the_oracle():
    engine, plain = (make_engine(dtype=torch.bfloat16, **options) for options in (FP8_STORAGE, {}))
    assert engine.pool.nbytes * 2 == plain.pool.nbytes == 64 * plain.pool.page_bytes
    assert {kv.k.dtype for kv in engine.pool.layers} == {torch.float8_e4m3fn}
    assert make_engine(num_pages=None, capacity="1MiB", **FP8_STORAGE).num_pages == 4 * (2**20 // 3072) + 1
    tokens = random_tokens(np.random.default_rng(0), 30)
    rows = []
    for each in (engine, plain):
        with each.acquire(tokens) as lease, each.step([lease]) as step:
            rows.append(forward(step, torch.bfloat16).double())
    expected = oracle(tokens)
    # e4m3 has 4 bits: a layer's mean of values is off by a few per cent of a value at most.
    assert (rows[0] - expected).abs().max() < 0.1 * expected.abs().max()
    assert not torch.equal(*rows)


def test_a_page_copy_and_a_fork_carry_the_values():
    for fork, last in forked(make_engine()):
        assert (last.double() - oracle(fork)[-1]).abs().max() < 1e-4


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_a_fork_answers_as_one_who_computed_all_of_it(storage):
    """Of a page that is copied when two go on from it: codes and scales, bit for bit, in every format."""
    for fork, last in forked(make_engine(**storage)):
        engine = make_engine(**storage)
        with engine.acquire(fork) as lease, engine.step([lease]) as step:
            assert torch.equal(forward(step)[-1], last)


def forked(engine):
    """Of two forks that go on from the middle of a page: their tokens, and the last row that each computed."""
    with engine.acquire([1, 2, 3, 4, 5, 6]) as lease:
        with engine.step([lease]) as step:
            forward(step)
        forks = [lease.fork() for _ in range(2)]
        for i, fork in enumerate(forks):
            fork.extend([10 + i])
        with engine.step(forks) as step:
            out = forward(step)
        found = [(fork.tokens.tolist(), out[last]) for fork, last in zip(forks, step.last_rows, strict=True)]
        for fork in forks:
            fork.release()
        return found


def test_a_step_that_fails_advances_nothing():
    engine = make_engine()
    lease = engine.acquire([1, 2, 3])
    with pytest.raises(KeyError), engine.step([lease]) as step:
        forward(step)
        raise KeyError
    assert lease.num_written == 0
    with pytest.raises(radixkv.LeaseError, match="attended 1 of 3 layers"), engine.step([lease]) as step:
        x = embed(step.input_ids, step.positions, torch.float32)
        step.attend(0, *qkv(x, 0))
    assert lease.num_written == 0
    with engine.step([lease]) as step:
        forward(step)
    assert lease.num_written == 3
    lease.release()
    assert engine.cache.match([1, 2, 3]) == 3


def test_steps_one_at_a_time_and_only_while_open():
    engine = make_engine()
    a, b = engine.acquire([1, 2]), engine.acquire([3])
    with engine.step([a]) as step:
        with pytest.raises(radixkv.LeaseError, match="another step"), engine.step([b]):
            pass
        forward(step)
        x = embed(step.input_ids, step.positions, torch.float32)
    with pytest.raises(radixkv.LeaseError, match="not open"):
        step.attend(0, *qkv(x, 0))
    with pytest.raises(radixkv.InvalidArgument, match="nothing to compute"), engine.step([a]):
        pass
    with engine.step([b]) as step, pytest.raises(radixkv.InvalidArgument, match="layers 0 to 2"):
        x = embed(step.input_ids, step.positions, torch.float32)
        try:
            step.attend(3, *qkv(x, 0))
        finally:
            forward(step)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q.double(), k, v), "dtype|float64"),
        (lambda q, k, v: (q[:1], k, v), "shape|rows"),
        (lambda q, k, v: (q, k[:, :1], v), "shape|heads"),
        (lambda q, k, v: (q, k, v[..., :8]), "shape"),
        (lambda q, k, v: (q.transpose(1, 2).contiguous().transpose(1, 2), k, v), "contiguous|stride"),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    engine = make_engine()
    lease = engine.acquire([1, 2])
    with pytest.raises(radixkv.InvalidArgument, match=message), engine.step([lease]) as step:
        x = embed(step.input_ids, step.positions, torch.float32)
        step.attend(0, *change(*qkv(x, 0)))
    assert lease.num_written == 0
    engine.cache.check()


def test_bad_engines():
    for options, message in (
        ({"num_pages": None}, "either num_pages or capacity"),
        ({"capacity": "1GiB"}, "either num_pages or capacity"),
        ({"num_pages": None, "capacity": 0}, "capacity must be"),
        ({"num_pages": None, "capacity": 1.5}, "capacity must be"),
        ({"num_pages": None, "capacity": "12 parsecs"}, "amount of memory"),
        ({"num_pages": None, "capacity": "1KiB"}, "hold no page: one takes 3072 bytes"),
        ({"num_pages": 0}, "num_pages must be"),
        ({"page_size": 0}, "page_size must be"),
        ({"dtype": torch.int8}, "dtype"),
        ({"dtype": "float32"}, "dtype is 'float32': give a torch.dtype"),
        ({"kv_format": "int3"}, "kv_format is 'int3': use None, one of fp32, "),
        ({"kv_format": ["fp8"]}, "kv_format has 1 formats for 3 layers"),
        ({"layers": [LayerShape(4, 2, 16)]}, "give layers, or num_layers, num_qo_heads, num_kv_heads and head_dim"),
        ({"device": "gpu"}, "device is 'gpu': give 'cpu'"),
        ({"device": None}, "device is None: give 'cpu'"),
    ):
        with pytest.raises(radixkv.InvalidArgument, match=message):
            make_engine(**options)
    with pytest.raises(radixkv.InvalidArgument, match="multiple of num_kv_heads"):
        radixkv.Engine(num_layers=1, num_qo_heads=5, num_kv_heads=2, head_dim=16, num_pages=4)
    with pytest.raises(radixkv.BackendUnavailable, match="device"):
        make_engine(device="meta")
    for layers in ([], [(4, 2, 16)]):
        with pytest.raises(radixkv.InvalidArgument, match="give a LayerShape for each layer"):
            radixkv.Engine(layers=layers, num_pages=4)
    with pytest.raises(radixkv.InvalidArgument, match="or layers, where they differ"):
        radixkv.Engine(num_layers=3, num_pages=4)
    half = RowFormat("bfloat16")
    with pytest.raises(radixkv.BackendUnavailable, match="stores K as bfloat16: use float32"):
        make_engine(kv_format=LayerFormat(half, half))
    with pytest.raises(radixkv.BackendUnavailable, match="CUDA device|float32"):
        make_engine(device="cuda")


def test_capacity_in_bytes_and_as_a_share():
    assert make_engine(num_pages=None, capacity="1MiB").num_pages == 2**20 // 3072
    assert make_engine(num_pages=None, capacity=2**20).num_pages == 2**20 // 3072
    assert make_engine(num_pages=None, capacity=1e-6).num_pages > 0
    assert [parse_bytes(t) for t in ("4GiB", "1.5 MiB", "2MB", "77")] == [2**32, 3 * 2**19, 2_000_000, 77]


def test_known_sizes_of_a_token():
    bf16 = layer_formats(None, "bfloat16", 1)[0]
    assert 32 * bf16.token_bytes(LayerShape(32, 8, 128)) == 131_072  # Llama-3 8B
    assert 30 * bf16.token_bytes(LayerShape(9, 3, 64)) == 23_040  # SmolLM2
    assert fp8().page_bytes(16, LayerShape(9, 3, 64)) == 16 * 3 * 2 * 64
    assert fp8().page_bytes(1, LayerShape(1, 1, 8)) == 2 * 16, "pages begin at multiples of 16 bytes"


# Layers that differ in everything: heads, dimensions of K and V, format.
SHAPES = [LayerShape(4, 2, 16), LayerShape(8, 1, 24, 8), LayerShape(6, 3, 64, 32), LayerShape(4, 2, 16)]
FORMATS = [None, fp8(0.5, 0.25), None, fp8(0.1, 0.2)]


def test_a_page_of_a_layer_is_one_run_of_bytes():
    engine = radixkv.Engine(layers=SHAPES, kv_format=FORMATS, num_pages=12, page_size=5, dtype=torch.float16)
    pool, runs = engine.pool, []
    for kv, shape in zip(pool.layers, SHAPES, strict=True):
        assert kv.shape == shape
        for pages, rows, dim in ((kv.k_pages, kv.k, shape.k_dim), (kv.v_pages, kv.v, shape.v_dim)):
            assert rows.shape == (12, 5, shape.num_kv_heads, dim)
            assert pages.is_contiguous()
            assert rows.data_ptr() == pages.data_ptr()
            assert rows[3].is_contiguous()
            assert 0 <= pages.shape[1] - rows[3].nbytes < 16
            runs.append((pages.data_ptr(), pages.data_ptr() + pages.nbytes))
    assert all(end <= begin for (_, end), (begin, _) in zip(sorted(runs), sorted(runs)[1:], strict=False))
    assert pool.nbytes == sum(end - begin for begin, end in runs) == 12 * pool.page_bytes


def read(pool, pages):
    out = np.empty((len(pages), pool.page_bytes), np.uint8)
    pool.read_pages(np.asarray(pages, np.int32), out)
    return torch.from_numpy(out)


def filled():
    """A pool of random bytes."""
    pool = KVPool(SHAPES, layer_formats(FORMATS, "bfloat16", 4), 12, 4, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for kv in pool.layers:
        for pages in (kv.k_pages, kv.v_pages):
            pages.copy_(torch.randint(0, 256, pages.shape, dtype=torch.uint8, generator=generator))
    return pool


@pytest.mark.parametrize("most_bytes", [1, 700, 1 << 20])
def test_pages_are_copied_alike_one_by_one_and_in_batches(most_bytes):
    before, one, batched = filled(), filled(), filled()
    source, target = np.array([3, 3, 0, 7, 5], np.int32), np.array([1, 4, 2, 11, 6], np.int32)
    one.copy_pages(source, target)
    for block in batched._blocks.values():
        copy_batched(block, source, target, most_bytes)
    everything = np.arange(12, dtype=np.int32)
    want = read(before, everything)
    want[target] = want[source]
    assert torch.equal(read(one, everything), want)
    assert torch.equal(read(batched, everything), want)


def test_pages_are_read_and_written_as_bytes():
    pool, other = filled(), filled()
    data = read(pool, [4, 9])
    assert data.shape == (2, pool.page_bytes)
    assert torch.equal(data[0, : pool.layers[0].k_pages.shape[1]], pool.layers[0].k_pages[4])
    other.write_pages(np.array([1, 0], np.int32), data.numpy())
    for ours, theirs in zip(pool.layers, other.layers, strict=True):
        assert torch.equal(theirs.k_pages[1], ours.k_pages[4])
        assert torch.equal(theirs.v_pages[0], ours.v_pages[9])
        assert torch.equal(theirs.v_pages[2:], ours.v_pages[2:])


def mixed_forward(step, dtype):
    """A model whose layers differ, over random q, k and v that follow from token, position and layer."""
    rows = []
    for layer, shape in enumerate(SHAPES):
        seeds = (step.input_ids * 1000 + step.positions).tolist()
        x = [torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(s * 10 + layer)) for s in seeds]
        x = torch.stack(x).to(dtype)
        q = x[:, 0, : shape.num_qo_heads, : shape.k_dim]
        k = x[:, 1, : shape.num_kv_heads, : shape.k_dim]
        v = x[:, 1, -shape.num_kv_heads :, -shape.v_dim :]
        out = step.attend(layer, q, k, v)
        assert out.shape == (len(seeds), shape.num_qo_heads, shape.v_dim)
        rows.append((q, k, v, out))
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_that_differ_match_the_oracle_and_hit_as_they_miss(dtype):
    rng = np.random.default_rng(2)
    tokens = random_tokens(rng, 150)

    def answer(engine, num_cached):
        with engine.acquire(tokens) as lease:
            assert lease.num_cached == num_cached
            with engine.step([lease]) as step:
                return mixed_forward(step, dtype)

    def engine():
        return radixkv.Engine(layers=SHAPES, kv_format=FORMATS, num_pages=60, page_size=7, dtype=dtype)

    warm, cold = engine(), engine()
    with warm.acquire(tokens[:90]) as lease, warm.step([lease]) as step:
        mixed_forward(step, dtype)
    hit, miss = answer(warm, 90), answer(cold, 0)
    for shape, stored, (*_, ours), (q, k, v, out) in zip(SHAPES, FORMATS, hit, miss, strict=True):
        assert torch.equal(ours, out[90:])
        if stored is not None:
            continue  # the tests of 8 bits compare these with an oracle
        group = shape.num_qo_heads // shape.num_kv_heads
        k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
        logits = torch.einsum("nhd,mhd->hnm", q.double(), k) * shape.k_dim**-0.5
        logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), float("-inf"))
        expected = torch.einsum("hnm,mhd->nhd", logits.softmax(-1), v)
        assert (out.double() - expected).abs().max() < {4: 1e-5, 2: 2e-2}[dtype.itemsize]


def test_a_table_of_another_pool_is_refused():
    engine, other = make_engine(num_pages=64), make_engine(num_pages=32)
    with pytest.raises(radixkv.InvalidArgument, match="of 64 pages of 4 tokens: this attention is for 32 of 4"):
        other.attention.plan(engine.table)


def test_hierarchical_namespaces_share_k_and_v():
    sizes = {"num_layers": 1, "num_qo_heads": 2, "num_kv_heads": 1, "head_dim": 16, "page_size": 4, "num_pages": 16}
    engine = radixkv.Engine(**sizes, dtype=torch.float32, hierarchical=True)
    rows = torch.randn(12, 4, 16)
    answers = []
    for namespace in ("acme", "acme/ann", "acme/bob"):
        with engine.acquire(range(12), namespace) as lease, engine.step([lease]) as step:
            q, k, v = rows[lease.num_cached :].split([2, 1, 1], dim=1)
            answers.append((lease.num_cached, step.attend(0, q, k, v)[-1]))
    assert [cached for cached, _ in answers] == [0, 11, 11]
    assert all(torch.equal(answers[0][1], answer) for _, answer in answers)
