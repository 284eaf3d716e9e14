"""Pages that lie wholly outside a sliding window leave a lease's view; no answer changes."""

from __future__ import annotations

import numpy as np
import pytest

import radixkv

torch = pytest.importorskip("torch")

from tests.engine.test_engine import LAYERS, embed, make_engine, qkv  # noqa: E402

PAGES = 4000


def forward(step, window_left, dtype):
    x = embed(step.input_ids, step.positions, dtype)
    for layer in range(LAYERS):
        x = x + step.attend(layer, *qkv(x, layer), window_left=window_left)
    return x


def tokens_of(rng, n):
    return rng.integers(0, 50, n).tolist()


# --- the cache alone --------------------------------------------------------------------------------------------------


@pytest.fixture
def cache():
    cache = radixkv.PrefixCache(num_pages=16, page_size=4)
    yield cache
    cache.check()


def test_private_pages_are_freed_and_nothing_after_them_is_published(cache):
    lease = cache.acquire(list(range(18)))
    lease.advance()
    before = lease.pages.tolist()
    assert lease.drop(11) == 2  # the third page is not wholly in the first 11 tokens
    assert (lease.num_dropped, lease.pages.tolist()) == (8, before[2:])
    assert (cache.stats().free, cache.stats().private) == (13, 3)
    assert lease.drop(5) == 0
    assert lease.num_dropped == 8
    assert lease.tokens.tolist() == list(range(18))
    lease.release()
    assert cache.stats().free == 16


def test_shared_pages_stay_and_what_was_committed_is_found_again(cache):
    with cache.acquire(list(range(10))) as lease:
        lease.advance()
    lease = cache.acquire([*range(10), 50, 51, 52, 53, 54])
    lease.advance()
    assert lease.drop(8) == 0  # two pages of the tree
    assert cache.stats().protected == 2
    lease.commit()
    assert lease.drop(15) == 0
    lease.extend([55, 56, 57, 58, 59, 60])
    lease.advance()
    assert lease.drop(20) == 2
    lease.release()
    assert cache.match([*range(10), 50, 51, 52, 53, 54, 55, 56]) == 15


def test_a_fork_inherits_the_view_and_needs_what_was_dropped_to_be_committed(cache):
    lease = cache.acquire(list(range(9)))
    lease.advance()
    lease.commit()
    lease.drop(4)
    with lease.fork() as child:
        assert (child.num_dropped, child.tokens.tolist()) == (4, list(range(9)))
        assert child.pages[:1].tolist() == lease.pages[:1].tolist()
    lease.extend([9, 10, 11, 12])
    lease.advance()
    lease.drop(12)
    with pytest.raises(radixkv.LeaseError, match=r"first 12 tokens were dropped, 8 of them committed; commit\(\)"):
        lease.fork()
    lease.release()


@pytest.mark.parametrize("n", [-1, 6])
def test_only_written_tokens_can_be_dropped(cache, n):
    lease = cache.acquire([1, 2, 3, 4, 5, 6])
    lease.advance(5)
    with pytest.raises(radixkv.InvalidArgument, match=f"first {n} tokens: only the 5 written"):
        lease.drop(n)
    assert lease.num_dropped == 0
    lease.release()


def test_behind_a_window_an_answer_may_outgrow_the_pool(cache):
    lease = cache.acquire(list(range(4)))
    for token in range(16 * 4 * 3):
        lease.advance()
        lease.drop(max(0, lease.num_written - 8))
        lease.extend([token])
        cache.check()
    assert lease.num_tokens == 4 + 16 * 4 * 3
    assert cache.stats().private == 3
    with pytest.raises(radixkv.PoolExhausted, match="46 pages of which were dropped; the whole pool has 16 pages"):
        lease.extend(range(16 * 4))
    lease.release()


def test_shared_pages_that_a_lease_dropped_still_count(cache):
    with cache.acquire(range(40)) as lease:
        lease.advance()
    lease = cache.acquire(range(41))
    lease.advance()
    lease.drop(40)
    with pytest.raises(radixkv.PoolExhausted, match="need 17 pages for 65 tokens; the whole pool"):
        lease.extend(range(24))
    lease.extend(range(23))
    lease.release()


def test_the_recorder_writes_all_tokens(cache, tmp_path):
    from radixkv.traces import Recorder, read_trace

    path = tmp_path / "trace.msgpack"
    with Recorder(str(path)).attach(cache):
        lease = cache.acquire([1, 2, 3, 4, 5, 6])
        lease.advance()
        lease.drop(4)
        for page in range(2):  # its place has a new owner
            cache.acquire([page + 7] * 5).release(False)
        lease.release()
    assert [r.tokens_in.tolist() for r in read_trace(str(path))][-1] == [1, 2, 3, 4, 5, 6]


# --- with attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "kv_format"),
    [(torch.float32, None), (torch.bfloat16, None), *((torch.float32, f) for f in ("fp8", "int8", "k8v4", "int4"))],
)
@pytest.mark.parametrize("page_size", [1, 16, 48, 512])
def test_dropping_changes_no_bit(page_size, dtype, kv_format):
    """Two engines serve the same requests, mixed with others; one drops after every step."""
    rng = np.random.default_rng(page_size)
    window = 100
    options = {"page_size": page_size, "dtype": dtype, "kv_format": kv_format}
    engines = [make_engine(num_pages=PAGES * 4 // page_size, **options) for _ in range(2)]
    prompts = [tokens_of(rng, 1300), tokens_of(rng, 600), tokens_of(rng, 40)]
    prompts.append(prompts[0][:900] + tokens_of(rng, 1100))
    with engines[0].acquire(prompts[0][:700]) as first:  # found by the last prompt in one engine only
        with engines[0].step([first]) as step:
            forward(step, window, dtype)
        first.advance()
    leases = [[engine.acquire(p) for p in prompts] for engine in engines]
    freed = 0
    for _ in range(6):
        outs = []
        for engine, batch in zip(engines, leases, strict=True):
            with engine.step(batch) as step:
                outs.append(forward(step, window, dtype)[step.last_rows])
        assert torch.equal(*outs)
        freed += sum(engines[0].drop(lease, window) for lease in leases[0])
        engines[0].cache.check()
        new = [tokens_of(rng, int(rng.choice([1, 1, 200]))) for _ in prompts]
        for batch in leases:
            for lease, tokens in zip(batch, new, strict=True):
                lease.extend(tokens)
    assert freed > 0
    assert all(a.num_dropped % 512 == 0 and b.num_dropped == 0 for a, b in zip(*leases, strict=True))
    assert sum(len(lease.pages) for lease in leases[0]) < sum(len(lease.pages) for lease in leases[1])
    for engine, batch in zip(engines, leases, strict=True):
        for lease in batch:
            lease.release()
        engine.cache.check()


def test_rows_that_look_further_back_are_refused():
    engine = make_engine(num_pages=PAGES)
    lease = engine.acquire(list(range(40)) * 15)
    with engine.step([lease]) as step:
        forward(step, 10, torch.float32)
    with pytest.raises(radixkv.InvalidArgument, match="window_left is -1: only a window"):
        engine.drop(lease, -1)
    assert engine.drop(lease, 80) == 128
    lease.extend([1])
    for window in (-1, 89):
        with (
            pytest.raises(radixkv.InvalidArgument, match=f"window_left is {window}.*look back 88 keys"),
            engine.step([lease]) as step,
        ):
            forward(step, window, torch.float32)
    with engine.step([lease]) as step:
        forward(step, 88, torch.float32)
    with pytest.raises(radixkv.LeaseError, match="not open"):
        forward(step, 88, torch.float32)
    lease.release()


def test_shared_views_are_read_once_after_a_drop():
    """Requests that dropped the same pages still share the rest, and the plan sees it."""
    engine = make_engine(num_pages=PAGES, page_size=16)
    base = list(range(50)) * 40
    with engine.acquire(base) as first, engine.step([first]) as step:
        forward(step, 1400, torch.float32)
    leases = [engine.acquire([*base, n]) for n in range(4)]
    with engine.step(leases) as step:
        forward(step, 1400, torch.float32)
    for lease in leases:
        engine.drop(lease, 1400)
        assert lease.num_dropped == 512
        lease.extend([7])
    with engine.step(leases) as step:
        forward(step, 1400, torch.float32)
        assert step.plan.segments[0].users == (0, 1, 2, 3)
        assert step.plan.segments[0].page_end == (2000 - 512) // 16
    for lease in leases:
        lease.release()
