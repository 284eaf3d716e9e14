"""Shared K and V read once for all users: the same bits as when every request reads its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import radixkv
from radixkv.attention.cascade import NATIVE, OFF, CascadeCosts, CascadePlan
from radixkv.attention.native import NativeAttention
from radixkv.errors import InvalidArgument, LeaseError
from radixkv.formats import LayerFormat
from radixkv.pool import LayerKV
from tests.attention.cascade_helpers import Forest, random_forest
from tests.attention.helpers import ISAS, Heads, Options, each_format, garble, layer_of, put, takes
from tests.attention.helpers import one_torch_thread as one_torch_thread

pytestmark = pytest.mark.usefixtures("one_torch_thread")
EAGER = CascadeCosts(min_tokens=1, launch_tokens=-1.0, merge_tokens=0.0, max_rows=0)
HEADS = [Heads(4, 2, 16), Heads(3, 3, 8), Heads(7, 1, 24), Heads(4, 4, 48, value=32)]
OPTIONS = [
    Options(),
    Options(window_left=0),
    Options(window_left=70),
    Options(0.3, 600, 5.0),
    Options(None, -1, 2.0),
    Options(attention_chunk=100),
    Options(attention_chunk=512),
]
INT_OF = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class Layer:
    """One layer's caches, random but for the slots of new rows, which hold NaN until they are appended."""

    def __init__(
        self, forest: Forest, heads: Heads, dtype: torch.dtype, seed: int, kv_format: str | LayerFormat | None = None
    ) -> None:
        self.forest, self.heads, self.dtype, self.kv_format = forest, heads, dtype, kv_format
        self.table = forest.table()
        generator = torch.Generator().manual_seed(seed)
        rows = sum(forest.rows)

        def randn(*shape: int, dim: int = heads.dim) -> torch.Tensor:
            return torch.randn(*shape, dim, generator=generator).to(dtype)

        v_dim = heads.shape.v_dim
        self.q, self.k_new, self.v_new = randn(rows, heads.qo), randn(rows, heads.kv), randn(rows, heads.kv, dim=v_dim)
        if heads.latent:
            self.v_new = self.k_new[..., : heads.latent]
        before = self.new_layer()
        garble(before)
        cached = torch.ones(forest.num_pages * forest.page_size, dtype=torch.bool)
        cached[torch.from_numpy(self.table.slots).long()] = False
        pages, slots = cached.view(-1, forest.page_size).nonzero(as_tuple=True)
        k, v = randn(len(pages), heads.kv), randn(len(pages), heads.kv, dim=v_dim)
        put(before, pages, slots, k, k[..., : heads.latent] if heads.latent else v)
        self.before = before

    def new_layer(self) -> LayerKV:
        return layer_of(self.heads, self.dtype, self.forest.num_pages, self.forest.page_size, self.kv_format)

    def backend(self, costs: CascadeCosts, threads: int, isa: str | None = None) -> NativeAttention:
        self.layer = self.new_layer()
        return NativeAttention([self.layer], dtype=self.dtype, num_threads=threads, isa=isa, cascade=costs)

    def attend(
        self, backend: NativeAttention, options: list[Options], sinks: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """With the backend that was made last."""
        self.layer.k_pages.copy_(self.before.k_pages)
        self.layer.v_pages.copy_(self.before.v_pages)
        backend.plan(self.table)
        backend.append(0, self.k_new, self.v_new)
        outs = []
        for o in options:
            outs.append(torch.full((*self.q.shape[:2], self.v_new.shape[2]), torch.nan, dtype=self.dtype))
            backend.run(0, self.q, outs[-1], o, sinks)
        return outs


def assert_same_bits(got: torch.Tensor, want: torch.Tensor, why: object) -> None:
    assert not want.isnan().any()
    assert torch.equal(got.view(INT_OF[got.dtype]), want.view(INT_OF[want.dtype])), why


@pytest.mark.parametrize("isa", ISAS)
@each_format
@pytest.mark.parametrize("dtype", list(INT_OF), ids=str)
def test_random_forests(isa: str, dtype: torch.dtype, kv_format: str | LayerFormat | None) -> None:
    """2,700 forests over all instruction sets, dtypes and formats, each with two sets of options and of threads."""
    rng = np.random.default_rng(len(isa))
    served = inside_chunk = 0
    heads = [h for h in HEADS if takes(kv_format, h)]
    for seed in range(-(-(1200 if kv_format is None else 300) // (len(ISAS) * len(INT_OF)))):
        page_size = int(rng.choice([1, 3, 16, 64, 100]))
        forest = random_forest(
            rng,
            requests=int(rng.integers(2, 9)),
            page_size=page_size,
            max_run=int(rng.choice([150, 700])) // page_size + 1,
            max_private=int(rng.choice([0, 60, 600])),
            row_choices=[[1], [1, 1, 4, 20], [1, 130]][seed % 3],
        )
        layer = Layer(forest, heads[int(rng.integers(len(heads)))], dtype, seed, kv_format)
        options = [OPTIONS[i] for i in rng.choice(len(OPTIONS), 2, replace=False)]
        sinks = torch.linspace(-2, 4, layer.heads.qo) if seed % 2 else None
        want = layer.attend(layer.backend(OFF, 1, isa), options, sinks)
        costs = NATIVE if seed % 4 == 0 else EAGER
        for threads in (1, 3):
            backend = layer.backend(costs, threads, isa)
            for got, expected, o in zip(layer.attend(backend, options, sinks), want, options, strict=True):
                assert_same_bits(got, expected, (seed, page_size, threads, o, backend.cascade.explain()))
        used = [s for s in backend.cascade.segments if s.used]
        served += len(used)
        inside_chunk += sum(s.token_end % 512 != 0 for s in used)
    assert served > 20
    assert inside_chunk > 10


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_many_users_of_a_long_prefix(threads: int) -> None:
    """Enough work to be split over threads and enough users for several blocks; two levels, a window between them."""
    shared, family = list(range(160)), list(range(160, 250))
    pages, fresh = [], 250
    for i in range(40):
        prefix = shared + (family if i % 2 else [])
        pages.append([*prefix, fresh, fresh + 1])
        fresh += 2
    forest = Forest(pages, [16 * len(p) - 3 for p in pages], [1 + i % 3 for i in range(40)], 16)
    layer = Layer(forest, Heads(14, 2, 32), torch.bfloat16, 0)
    options = [Options(), Options(window_left=1500), Options(window_left=100)]
    want = layer.attend(layer.backend(OFF, 1), options)
    backend = layer.backend(NATIVE, threads)
    for got, expected in zip(layer.attend(backend, options), want, strict=True):
        assert_same_bits(got, expected, threads)
    assert [s.used for s in backend.cascade.segments] == [True, True]
    assert backend.cascade.tokens_saved == 39 * 2560 + 19 * (250 * 16 // 64 * 64 - 2560)


def test_shared_keys_are_read_through_the_first_users_pages_only() -> None:
    """K and V of a segment come from one place: nothing is read for the other users."""
    pages = [[*range(32), 32 + i] for i in range(4)]
    forest = Forest(pages, [32 * 16 + 1] * 4, [1] * 4, 16)
    layer = Layer(forest, HEADS[0], torch.float32, 0)
    backend = layer.backend(NATIVE, 1)
    backend.plan(layer.table)
    plan = backend.cascade
    assert plan.tokens_read - plan.tokens_saved == 512 + 4
    assert plan.levels()[0].kv_indices.tolist() == list(range(32))


def test_a_plan_outlives_the_next_step() -> None:
    shared = Forest([[*range(40), 50], [*range(40), 51]], [641, 641], [1, 1], 16)
    layer = Layer(shared, HEADS[0], torch.float32, 0)
    backend = layer.backend(NATIVE, 1)
    backend.plan(layer.table)
    plan = backend.cascade
    apart = Forest([[3, 4], [5, 6]], [20, 20], [1, 1], 16)
    backend.plan(apart.table())
    assert plan.shared
    assert plan.tokens_saved == 640
    assert not backend.cascade.shared


def test_a_granularity_between_tiles_is_refused() -> None:
    layer = Layer(Forest([[0]], [3], [1], 16), HEADS[0], torch.float32, 0)
    with pytest.raises(InvalidArgument, match="granularity is 32: it must be a multiple of 64"):
        layer.backend(CascadeCosts(granularity=32), 1)


@pytest.mark.parametrize("dtype", list(INT_OF), ids=str)
def test_leases_share_published_pages(dtype: torch.dtype) -> None:
    """A conversation tree through Engine, once with and once without cascade: the same bits in every step."""

    def conversation(costs: CascadeCosts) -> tuple[list[torch.Tensor], int]:
        rng = np.random.default_rng(3)
        generator = torch.Generator().manual_seed(3)
        engine = radixkv.Engine(
            num_layers=2, num_qo_heads=6, num_kv_heads=2, head_dim=16, page_size=16, num_pages=600, dtype=dtype
        )
        engine.attention = NativeAttention(engine.pool.layers, dtype=dtype, cascade=costs)
        embedding = torch.randn(100, 6, 16, generator=generator)
        system = rng.integers(0, 100, 700).tolist()
        documents = [rng.integers(0, 100, 300).tolist() for _ in range(2)]
        outs, saved, leases = [], 0, []
        for turn in range(6):
            lease = engine.acquire(system + documents[turn % 2] + rng.integers(0, 100, 20 + turn).tolist())
            leases.append(lease)
            with engine.step(leases) as step:
                x = embedding[step.input_ids] * (1 + step.positions[:, None, None] / 999)
                for layer in range(2):
                    x = x + step.attend(layer, x.to(dtype), x[:, :2].to(dtype), x[:, 2:4].to(dtype)).float()
                assert isinstance(engine.attention, NativeAttention)
                saved += engine.attention.cascade.tokens_saved
            outs.append(x)
            lease.commit()
            engine.cache.check()
            for each in leases:
                each.extend(rng.integers(0, 100, 1 + turn % 2).tolist())
        return outs, saved

    want, nothing = conversation(OFF)
    got, saved = conversation(EAGER)
    assert nothing == 0
    assert saved > 5000
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_a_step_explains_its_plan() -> None:
    engine = radixkv.Engine(num_layers=1, num_qo_heads=4, num_kv_heads=2, head_dim=16, num_pages=300)

    def step_plan(leases: list[radixkv.Lease]) -> CascadePlan:
        with engine.step(leases) as step:
            count = len(step.input_ids)
            zeros = torch.zeros(count, 8, 16, dtype=torch.bfloat16)
            step.attend(0, zeros[:, :4], zeros[:, 4:6], zeros[:, 6:])
            return step.plan

    system = list(range(1000))
    first = engine.acquire([*system, 1])
    alone = step_plan([first])
    assert "no two (those of more than 16 new rows aside) share a full page" in alone.explain()
    first.commit()
    first.extend([5])
    others = [engine.acquire([*system, 2 + i]) for i in range(3)]
    plan = step_plan([first, *others])
    assert plan.shared
    assert "4 users (0, 1, 2, 3), pages 0 to 61, serves 960 tokens: used at level 0" in plan.explain()
    assert "2880 tokens (360 KiB)" in plan.explain()
    assert not alone.shared
    with pytest.raises(LeaseError, match="ask for its plan inside"):
        _ = engine.step(others).plan
