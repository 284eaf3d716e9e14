"""Tiers below a pool on a GPU, on a twin of CUDA's streams, and on a device that is there or emulated."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import radixkv  # noqa: E402 (after the skip)
import radixkv.engine as engine_module  # noqa: E402
from radixkv.formats import fp8, layer_formats  # noqa: E402
from radixkv.pool import KVPool  # noqa: E402
from radixkv.shape import LayerShape  # noqa: E402
from radixkv.tiers import TierOptions, Tiers  # noqa: E402
from radixkv.tiers.device import Cuda, DevicePages  # noqa: E402
from tests.engine.test_engine import make_engine, random_tokens  # noqa: E402
from tests.tiers.pool import IDENTITY, PAGE_BYTES, PAGE_SIZE, content  # noqa: E402
from tests.tiers.streams import LazyCuda, LazyPool, LazyStream  # noqa: E402
from tests.tiers.test_engine_tiers import options, serve  # noqa: E402

ORDERS = [("late", 0), ("early", 0), *(("mixed", seed) for seed in range(6))]


class Host:
    """An engine whose steps launch and do not wait."""

    def __init__(self, order, path=None, num_pages=24):
        self.cuda = LazyCuda(*order)
        self.pool = LazyPool(self.cuda, num_pages, PAGE_BYTES)
        self.pages = DevicePages(self.pool, self.cuda)
        self.cache = radixkv.PrefixCache(num_pages, PAGE_SIZE)
        options = TierOptions(disk=path, disk_capacity=64 * 4096, threads=0, secret=b"s", ram=40 * 4096)
        self.tiers = Tiers(self.cache, self.pages, IDENTITY, options)
        self.seen = []  # (what a step was to read, what it read)

    def serve(self, tokens):
        """Fetch, fill, compute the rest; every page is read in the next step. The tokens that the tiers gave."""
        fetch = self.tiers.fetch(tokens)
        self.tiers.pump()
        with self.cache.acquire(tokens) as lease:
            gained = self.tiers.fill(lease, fetch)
            self.pages.step_begins(timed=False)
            for i in range(len(lease.tokens) // PAGE_SIZE):
                right = torch.from_numpy(content("", tokens[: (i + 1) * PAGE_SIZE]).copy())
                if i >= lease.num_written // PAGE_SIZE:
                    self.pool.launch_write(int(lease.pages[i]), right)
                got = []
                self.pool.launch_read(int(lease.pages[i]), got)
                self.seen.append((right, got))
            lease.advance()
        return gained

    def right(self):
        """All that was launched has read what it should have."""
        for stream in self.cuda.streams:
            stream.synchronize()
        return all(torch.equal(right, *got) for right, got in self.seen)

    def stored_right(self, prompts):
        """What lies in the hub and on the disk is what each page holds, for as many as there are."""
        count = 0
        for tokens in prompts:
            fetch = self.tiers.fetch(tokens)
            self.tiers.pump()
            for i in range(fetch.first, fetch.first + fetch.num_pages):
                row = self.tiers.hub.memory[fetch.slots[i], :PAGE_BYTES]
                if not np.array_equal(row, content("", tokens[: (i + 1) * PAGE_SIZE])):
                    return -1
                count += 1
            fetch.cancel()
        return count


def traffic(seed):
    rng = np.random.default_rng(seed)
    starts = [100 * int(rng.integers(5)) for _ in range(40)]
    return [[*range(n, n + 30)][: int(rng.integers(12, 30))] + rng.integers(0, 3, 5).tolist() for n in starts]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_steps_read_what_they_should_and_tiers_store_it(tmp_path, order):
    host, prompts, gained = Host(order, tmp_path), traffic(order[1]), 0
    for tokens in prompts:
        gained += host.serve(tokens)
    assert gained > 0
    host.tiers.pump()
    host.cache.evict(24)
    assert host.stored_right(prompts) > 20
    assert host.right()
    host.tiers.close()


def comes_in(order):
    """Whether a page has its old bytes for what was launched before, and the new ones for what is launched after."""
    cuda = LazyCuda(*order)
    pool = LazyPool(cuda, 40, PAGE_BYTES)
    pages, old, new = DevicePages(pool, cuda), [], []
    rows = np.arange(40 * PAGE_BYTES).astype(np.uint8).reshape(40, PAGE_BYTES)
    right = torch.from_numpy(rows.copy())
    for page in range(40):
        pool.launch_write(page, torch.full((PAGE_BYTES,), 7, dtype=torch.uint8))
        pool.launch_read(page, old)
    pages.write_pages(np.arange(40, dtype=np.int32), list(rows))
    rows[:] = 9  # the slots are others' now
    for page in range(40):
        pool.launch_read(page, new)
    cuda.current().synchronize()
    return all((page == 7).all() for page in old) and torch.equal(torch.stack(new), right)


def goes_out(order):
    """Whether what is read is what was launched last."""
    cuda = LazyCuda(*order)
    pool = LazyPool(cuda, 40, PAGE_BYTES)
    pages, out = DevicePages(pool, cuda), np.zeros((40, PAGE_BYTES), np.uint8)
    right = torch.arange(40 * PAGE_BYTES).to(torch.uint8).view(40, PAGE_BYTES)
    for page in range(40):
        pool.launch_write(page, right[page])
    pages.read_pages(np.arange(40, dtype=np.int32), list(out))
    return np.array_equal(out, right.numpy())


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_pages_come_in_and_go_out_in_order(order):
    assert comes_in(order)
    assert goes_out(order)


@pytest.mark.parametrize(
    ("lost", "check"),
    [
        ("the worker waits for the steps", goes_out),
        ("the worker waits for its copies", goes_out),
        ("steps wait for what comes in", comes_in),
        ("the host waits until rows are read", comes_in),
        ("pages come in on the stream of the steps", comes_in),
    ],
)
def test_each_wait_is_needed(monkeypatch, lost, check):
    """Without it the twin sees something else, in one order or another."""
    wait, synchronize, write = LazyStream.wait_stream, LazyStream.synchronize, DevicePages.write_pages
    steps, out, coming = range(3)

    def unless(number, what, does):
        def method(stream, *arguments):
            if lost != what or stream is not stream.cuda.streams[number]:
                does(stream, *arguments)

        return method

    waits = unless(out, "the worker waits for the steps", wait)
    monkeypatch.setattr(LazyStream, "wait_stream", unless(steps, "steps wait for what comes in", waits))
    ends = unless(out, "the worker waits for its copies", synchronize)
    monkeypatch.setattr(LazyStream, "synchronize", unless(coming, "the host waits until rows are read", ends))

    def elsewhere(pages, ids, data):
        with pages._cuda.on(pages._in):
            write(pages, ids, data)

    if lost == "pages come in on the stream of the steps":
        monkeypatch.setattr(DevicePages, "write_pages", elsewhere)
    assert not all(check(order) for order in ORDERS)


@pytest.mark.parametrize("kv_format", [None, fp8(0.1, 0.3)], ids=["plain", "fp8"])
def test_an_engine_uses_them_and_times_its_steps(tmp_path, monkeypatch, kv_format):
    """The engine's part, over a pool in RAM and streams that do everything at once."""
    monkeypatch.setattr(engine_module, "device_pages_of", lambda pool: DevicePages(pool, LazyCuda("early")))
    prompt, answers = random_tokens(np.random.default_rng(0), 90), []
    for expected in (0, 88):
        with make_engine(kv_format=kv_format, tiers=options(tmp_path)) as engine:
            assert engine.device_pages._cuda.pinned[0] is engine.tiers.hub.memory
            out, gained = serve(engine, prompt)
            assert gained == expected
            answers.append(out)
            assert engine.tiers.stats()["computed_tokens_per_second"] is None
            serve(engine, prompt[::-1])
            if not expected:
                assert engine.tiers.stats()["computed_tokens_per_second"] == 90 / 0.25
    assert torch.equal(*answers)


def test_what_tiers_below_a_gpu_ask_for():
    device = torch.device("cuda")
    with pytest.raises(radixkv.InvalidArgument, match="what RAM to pin"):
        engine_module._check_tiers(TierOptions(weights="w"), device, False)
    with pytest.raises(radixkv.InvalidArgument, match="cuda_graphs"):
        engine_module._check_tiers(TierOptions(weights="w", ram="1GiB"), device, True)
    engine_module._check_tiers(TierOptions(weights="w", ram="1GiB"), device, False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pages_of_a_real_pool_come_back_with_the_same_bytes(tmp_path, monkeypatch):
    """On a device that is there, or emulated: what the twin cannot show is that torch's calls are right."""
    device, prompt = torch.device("cuda", 0), list(range(42))
    if torch.cuda.cudart() is None:  # the emulation neither pins memory nor knows whose turn it is
        nothing = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: nothing)
        monkeypatch.setattr(Cuda, "keep", lambda *_: None)
    shapes = [LayerShape(4, 2, 16), LayerShape(4, 2, 16), LayerShape(4, 1, 32)]
    before = None
    for expected in (0, 40):
        pool = KVPool(shapes, layer_formats(None, "bfloat16", 3), 16, PAGE_SIZE, device)
        cache, pages = radixkv.PrefixCache(16, PAGE_SIZE), DevicePages(pool, Cuda(device))
        rows = np.zeros((10, pool.page_bytes), np.uint8)
        with Tiers(cache, pages, IDENTITY, TierOptions(disk=tmp_path, disk_capacity=64 * 4096, threads=0)) as tiers:
            pages.pin(tiers.hub.memory)
            fetch = tiers.fetch(prompt)
            tiers.pump()
            with cache.acquire(prompt) as lease:
                assert tiers.fill(lease, fetch) == expected
                pages.step_begins(timed=False)
                for kv in pool.layers if not expected else ():
                    for memory in (kv.k_pages, kv.v_pages):
                        memory.copy_(torch.randint(0, 256, memory.shape, dtype=torch.uint8))
                pages.read_pages(lease.pages[:10], list(rows))
                lease.advance()
        if before is not None:
            assert np.array_equal(rows, before)
        before = rows.copy()
