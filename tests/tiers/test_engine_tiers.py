"""An engine with tiers below: what its users call, what it clears, what it never mixes up."""

from __future__ import annotations

import gc
import time
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import radixkv  # noqa: E402 (after the skip)
from radixkv.formats import fp8  # noqa: E402
from radixkv.shape import LayerShape  # noqa: E402
from radixkv.tiers import TierOptions  # noqa: E402
from tests.engine.test_engine import forward, make_engine, random_tokens  # noqa: E402

PROMPT = random_tokens(np.random.default_rng(0), 50)


def options(path, **more):
    return TierOptions(**{"weights": "w", "disk": path, "disk_capacity": "4MiB", "threads": 0, **more})


def serve(engine: radixkv.Engine, tokens: list[int], namespace: str = "") -> tuple[torch.Tensor, int]:
    """The last row of a prompt, and how many of its tokens came from the tiers."""
    fetch = engine.fetch(tokens, namespace)
    engine.tiers.pump()
    assert fetch.wait(5)
    with engine.acquire(tokens, namespace, fetched=fetch) as lease:
        gained = lease.num_written - lease.num_cached
        with engine.step([lease]) as step:
            out = forward(step, engine.dtype)[-1].clone()
    engine.tiers.pump()
    engine.cache.check()
    engine.tiers.hub.check()
    return out, gained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_format", [None, fp8(0.1, 0.3)], ids=["plain", "fp8"])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_a_restart_answers_with_the_same_bits(tmp_path, dtype, kv_format, page_size):
    answers = []
    for expected in (0, 49 // page_size * page_size):
        with make_engine(dtype=dtype, kv_format=kv_format, page_size=page_size, tiers=options(tmp_path)) as engine:
            out, gained = serve(engine, PROMPT)
            assert gained == expected
            answers.append(out)
    assert torch.equal(*answers)


@pytest.mark.parametrize("kv_format", [None, fp8(0.1, 0.3)], ids=["plain", "fp8"])
def test_a_family_of_namespaces_answers_with_the_same_bits_cold_warm_and_after_a_restart(tmp_path, kv_format):
    """ "a" publishes the first 32 tokens and "a/b" the rest; whoever is given them, by pool or disk, says the same."""
    sizes = {"kv_format": kv_format, "hierarchical": True}
    with make_engine(**sizes) as engine, engine.acquire(PROMPT) as lease, engine.step([lease]) as step:
        cold = forward(step, engine.dtype)[-1].clone()
    with make_engine(**sizes, tiers=options(tmp_path)) as engine:
        serve(engine, [*PROMPT[:32], 1], "a")
        for found in (32, 49):
            with engine.acquire(PROMPT, "a/b") as lease, engine.step([lease]) as step:
                assert lease.num_cached == found
                assert torch.equal(forward(step, engine.dtype)[-1], cold)
    for namespace, given in (("a/b", 48), ("a/c", 32), ("a", 32), ("b", 0), ("", 0)):
        with make_engine(**sizes, tiers=options(tmp_path, write="none")) as engine:
            out, gained = serve(engine, PROMPT, namespace)
            assert gained == given
            assert torch.equal(out, cold)
    with make_engine(**sizes, tiers=options(tmp_path, write="none")) as engine:
        assert serve(engine, PROMPT, "a/b")[1] == 48
        out, gained = serve(engine, PROMPT, "a/c")
        assert gained == 0  # the pool has them, as of "a"
        assert engine.cache.namespaces()["a/c"].hit_tokens == 32
        assert torch.equal(out, cold)
        engine.cache.clear("a")
        assert serve(engine, PROMPT, "a/b")[1] == 0


@pytest.mark.parametrize("threads", [0, 2])
def test_closing_an_engine_stores_what_it_published(tmp_path, threads):
    with make_engine(tiers=options(tmp_path, threads=threads)) as engine:
        lease = engine.acquire(PROMPT)
        with engine.step([lease]) as step:
            forward(step)
        lease.release()
    with make_engine(tiers=options(tmp_path)) as engine:
        assert serve(engine, PROMPT)[1] == 48


@pytest.mark.parametrize(
    "other",
    [
        {"tiers": {"weights": "w2"}},
        {"tiers": {"secret": b"other"}},
        {"page_size": 2},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"kv_format": fp8()},
        {"kv_format": [None, None, fp8()]},
        {"layers": [LayerShape(4, 2, 16, 16), LayerShape(4, 2, 16, 16), LayerShape(4, 4, 16, 16)]},
        {"layers": [LayerShape(4, 2, 16, 16)] * 2},
        {"layers": [LayerShape(4, 2, 16, 32)] * 3},
    ],
    ids=str,
)
def test_another_identity_finds_nothing(tmp_path, other):
    with make_engine(tiers=options(tmp_path)) as engine:
        serve(engine, PROMPT)
    sizes = {"num_pages": 64, "page_size": 4, "dtype": torch.float32, **other}
    if "layers" not in other:
        sizes |= {"num_layers": 3, "num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    sizes["tiers"] = options(tmp_path, **other.get("tiers", {}))
    with radixkv.Engine(**sizes) as engine:
        fetch = engine.fetch(PROMPT)
        engine.tiers.pump()
        assert fetch.ready
        assert fetch.tokens == 0


def test_scales_isa_and_torch_are_part_of_the_identity(tmp_path, monkeypatch):
    with make_engine(kv_format=fp8(0.1, 0.3), tiers=options(tmp_path)) as engine:
        serve(engine, PROMPT)
    for change in ("scale", "isa", "torch", "kernels", None):
        with monkeypatch.context() as patch:
            if change == "isa":
                patch.setattr(radixkv._core, "isa", lambda: "other")
            if change == "torch":
                patch.setattr(torch, "__version__", "0")
            if change == "kernels":
                patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "other")
            scale = 0.1 if change != "scale" else float(np.nextafter(0.1, 1))
            with make_engine(kv_format=fp8(scale, 0.3), tiers=options(tmp_path)) as engine:
                assert serve(engine, PROMPT)[1] == (0 if change else 48), change


@pytest.mark.parametrize("namespace", [None, "a"])
def test_clearing_the_cache_of_an_engine_clears_all_tiers(tmp_path, namespace):
    with make_engine(tiers=options(tmp_path)) as engine:
        for name in ("a", "b"):
            serve(engine, PROMPT, name)
        late = engine.fetch(PROMPT, "a")
        engine.tiers.pump()
        assert engine.cache.clear(namespace) > 0
        with engine.acquire(PROMPT, "a", fetched=late) as lease:
            assert lease.num_written == 0
            lease.release(False)
        engine.cache.evict(64)
        assert serve(engine, PROMPT, "b")[1] == (48 if namespace else 0)
        engine.cache.clear("b")
    with make_engine(tiers=options(tmp_path)) as engine:
        assert [serve(engine, PROMPT, name)[1] for name in ("a", "b")] == [0, 0]


def test_no_namespace_is_filled_from_another(tmp_path):
    with make_engine(tiers=options(tmp_path)) as engine:
        serve(engine, PROMPT, "a")
        assert serve(engine, PROMPT, "b")[1] == 0
        engine.cache.evict(64)
        fetch = engine.fetch(PROMPT, "a")
        engine.tiers.pump()
        assert fetch.tokens == 48
        with engine.acquire(PROMPT, "c", fetched=fetch) as lease:
            assert lease.num_written == 0
            lease.release(False)


def test_a_fetch_that_is_filled_late_or_twice_or_elsewhere(tmp_path):
    with make_engine(tiers=options(tmp_path)) as engine:
        serve(engine, PROMPT)
    with make_engine(tiers=options(tmp_path)) as engine, make_engine(tiers=options(tmp_path / "other")) as other:
        fetch = engine.fetch(PROMPT)
        engine.tiers.pump()
        with pytest.raises(radixkv.InvalidArgument, match="no fetch of this engine"):
            other.acquire(PROMPT, fetched=fetch)
        with pytest.raises(radixkv.InvalidArgument, match="no fetch of this engine"):
            engine.acquire(PROMPT, fetched=7)
        assert engine.cache.stats().num_leases == other.cache.stats().num_leases == 0
        with other.acquire(PROMPT) as lease:
            before = engine.pool.layers[0].k_pages.clone()
            with pytest.raises(radixkv.InvalidArgument, match="another cache"):
                engine.fill(lease, fetch)
            assert lease.num_written == 0
            assert torch.equal(engine.pool.layers[0].k_pages, before)
            lease.release(False)
        assert fetch.tokens == 48
        lease = engine.acquire(PROMPT)
        with engine.step([lease]) as step, pytest.raises(radixkv.LeaseError, match="open step"):
            forward(step)
            engine.fill(lease, fetch)
        assert engine.fill(lease, fetch) == 0  # all was computed meanwhile
        lease.release()
        with pytest.raises(radixkv.LeaseError, match="released"):
            engine.fill(lease, fetch)
        assert engine.tiers.stats()["hub"]["used"] == 0


def test_a_prefetch_makes_the_fetch_immediate(tmp_path):
    with make_engine(tiers=options(tmp_path)) as engine:
        serve(engine, PROMPT)
    with make_engine(tiers=options(tmp_path)) as engine:
        engine.prefetch(PROMPT)  # not kept
        engine.tiers.pump()
        fetch = engine.fetch(PROMPT)
        assert fetch.ready
        assert fetch.sources == {"ram": 48}


def test_without_tiers_an_engine_says_so():
    engine = make_engine()
    assert engine.tiers is None
    for call in (engine.fetch, engine.prefetch, lambda p: engine.acquire(p, fetched=1)):
        with pytest.raises(radixkv.InvalidArgument, match="tiers=TierOptions"):
            call(PROMPT)
    with pytest.raises(radixkv.InvalidArgument, match="weights_digest"):
        make_engine(tiers=TierOptions())
    with pytest.raises(radixkv.InvalidArgument, match="TierOptions"):
        make_engine(tiers="/some/folder")


@pytest.mark.parametrize("threads", [0, 2])
def test_an_engine_that_is_dropped_takes_its_tiers_along(tmp_path, threads):
    engine = make_engine(tiers=options(tmp_path, threads=threads))
    with engine.acquire(PROMPT) as lease, engine.step([lease]) as step:
        forward(step)
    gone = weakref.ref(engine.tiers)
    del engine, lease, step
    gc.collect()
    until = time.monotonic() + 5
    while gone() is not None and time.monotonic() < until:
        time.sleep(0.01)
    assert gone() is None
    time.sleep(0.05)
    with make_engine(tiers=options(tmp_path)) as engine:
        assert not engine.tiers.disk.read_only
        assert serve(engine, PROMPT)[1] == 48


def test_a_store_that_is_slower_than_computing_is_left_alone_for_a_while(tmp_path):
    with make_engine(tiers=options(tmp_path)) as engine:
        serve(engine, PROMPT)
    with make_engine(tiers=options(tmp_path, threads=1)) as engine:
        planner = engine.tiers.planner
        planner.computed(1000, 0.5)
        planner.loaded("disk", engine.pool.page_bytes, 4 * 0.5 / 1000 * 2)  # a page takes twice what computing it does
        declined = 0
        while (fetch := engine.fetch(PROMPT, deadline=5.0)).wait() and fetch.tokens == 0:
            declined += 1
            assert declined < 30
        assert engine.tiers.stats()["declined"] == declined > 3
        assert planner.deadline(1000) == 0.5
        assert planner.deadline(1) == 0.02


def test_steps_tell_the_planner_how_fast_prompts_are_computed(tmp_path):
    with make_engine(tiers=options(tmp_path), num_pages=128) as engine:
        serve(engine, PROMPT)
        assert engine.tiers.stats()["computed_tokens_per_second"] is None
        serve(engine, PROMPT * 2)
        serve(engine, PROMPT[::-1] * 2)
        assert engine.tiers.stats()["computed_tokens_per_second"] > 0


@pytest.mark.parametrize("kv_format", [None, fp8(0.1, 0.3)], ids=["plain", "fp8"])
def test_a_snapshot_gives_the_bits_of_a_hit(tmp_path, kv_format):
    def last_row(engine):
        with engine.acquire(PROMPT) as lease:
            assert lease.num_cached == 49
            with engine.step([lease]) as step:
                return forward(step)[-1].clone()

    sizes = {"kv_format": kv_format, "tiers": TierOptions(weights="w", threads=0)}
    with make_engine(**sizes) as engine, make_engine(**sizes) as other:
        with engine.acquire(PROMPT) as lease, engine.step([lease]) as step:
            forward(step)
        engine.save(tmp_path / "s")
        assert other.load(tmp_path / "s") == 50  # the open page as well
        assert torch.equal(last_row(engine), last_row(other))
        other.cache.check()
    with make_engine() as plain, pytest.raises(radixkv.InvalidArgument, match="tiers=TierOptions"):
        plain.save(tmp_path / "t")
    changed = {**sizes, "kv_format": fp8(0.1, 0.4)}
    with make_engine(**changed) as another, pytest.raises(radixkv.InvalidArgument, match="another identity: layers"):
        another.load(tmp_path / "s")
