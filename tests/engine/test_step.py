"""A step owns its leases while it is open, however it is left."""

from __future__ import annotations

import gc
import sys
import threading
import weakref

import pytest

import radixkv
from tests.cache.test_cache import state, step_over

torch = pytest.importorskip("torch")

from tests.engine.test_engine import STORAGES, embed, forward, make_engine, qkv  # noqa: E402

CHANGES = {
    "extend": lambda lease: lease.extend([7]),
    "extend by nothing": lambda lease: lease.extend([]),
    "advance": lambda lease: lease.advance(),
    "advance by nothing": lambda lease: lease.advance(0),
    "drop": lambda lease: lease.drop(0),
    "truncate": lambda lease: lease.truncate(4),
    "truncate nothing": lambda lease: lease.truncate(5),
    "commit": lambda lease: lease.commit(),
    "release": lambda lease: lease.release(),
    "release without commit": lambda lease: lease.release(False),
    "fork": lambda lease: lease.fork(),
    "adopt": lambda lease: lease.adopt(),
    "leave": lambda lease: lease.__exit__(None, None, None),
    "another step": lambda lease: step_over_same_cache(lease),
}


def step_over_same_cache(lease):
    step_over(step_over_same_cache.cache, [lease]).__enter__()


@pytest.fixture
def cache():
    step_over_same_cache.cache = cache = radixkv.PrefixCache(num_pages=16, page_size=4)
    yield cache
    cache.check()


# --- the cache's side: no layer, no torch ----------------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_nothing_changes_a_lease_in_an_open_step(cache, change):
    lease = cache.acquire([1, 2, 3, 4, 5])
    lease.advance(3)
    with step_over(cache, [lease]):
        before = state(cache), lease.tokens.tolist(), lease.pages.tolist(), lease.num_written
        with pytest.raises(radixkv.LeaseError, match="in an open step.*leave the step first"):
            change(lease)
        assert (state(cache), lease.tokens.tolist(), lease.pages.tolist(), lease.num_written) == before
    assert lease.num_written == 5
    lease.release()


def test_another_thread_cannot_take_a_lease_out_of_a_step(cache):
    lease = cache.acquire([1, 2, 3])
    refused = []

    def adopt():
        with pytest.raises(radixkv.LeaseError, match="in an open step") as error:
            lease.adopt()
        refused.append(error)

    with step_over(cache, [lease]):
        thread = threading.Thread(target=adopt)
        thread.start()
        thread.join()
    assert refused
    lease.release()


def test_a_table_takes_leases_of_its_own_cache_only(cache):
    other = radixkv.PrefixCache(16, 4)
    foreign, own = other.acquire([1, 2]), cache.acquire([1, 2])
    for leases in ([foreign], [own, foreign]):
        with pytest.raises(radixkv.InvalidArgument, match="lease . is of another cache"):
            step_over(cache, leases).__enter__()
    for lease in (foreign, own):
        lease.advance()  # both are free again
        lease.release()


def test_a_refused_batch_frees_every_lease_of_it(cache):
    good, done = cache.acquire([1, 2]), cache.acquire([3])
    done.advance()
    table = radixkv._core.PageTable(cache)
    for leases in ([good, done], [good, good], [good, None]):
        with pytest.raises(radixkv.InvalidArgument):
            step_over(cache, leases, table).__enter__()
        good.commit()
    with step_over(cache, [good], table):
        pass
    assert good.num_written == 2


def test_a_step_of_some_rows_plans_and_advances_by_those_only(cache):
    long, short = cache.acquire(list(range(10))), cache.acquire([90])
    table = radixkv._core.PageTable(cache)
    planned = []
    while leases := [lease for lease in (long, short) if lease.num_written < lease.num_tokens]:
        with radixkv._core.Step(table, leases, 0, 3):
            planned.append((table.input_ids.tolist(), table.kv_indptr.tolist(), table.kv_last_page_len.tolist()))
        long.commit()
    assert planned == [
        ([0, 1, 2, 90], [0, 1, 2], [3, 1]),
        ([3, 4, 5], [0, 2], [2]),
        ([6, 7, 8], [0, 3], [1]),
        ([9], [0, 3], [2]),
    ]
    assert cache.match(range(10)) == 10
    with pytest.raises(KeyError), radixkv._core.Step(table, [again := cache.acquire(range(20, 29))], 0, 4):
        raise KeyError
    assert again.num_written == 0


@pytest.mark.parametrize("most", [0, -1, 1.5, "2", True])
def test_rows_that_are_no_number_from_one_on_are_refused(cache, most):
    lease = cache.acquire([1, 2, 3])
    with pytest.raises(radixkv.InvalidArgument, match="max_rows"):
        radixkv._core.Step(radixkv._core.PageTable(cache), [lease], 0, most)
    with step_over(cache, [lease]):
        pass
    assert lease.num_written == 3


def test_a_step_left_by_an_exception_lets_go(cache):
    lease = cache.acquire([1, 2, 3])
    with pytest.raises(KeyError), step_over(cache, [lease]):
        raise KeyError
    assert lease.num_written == 0
    lease.extend([4])
    lease.release()


def test_a_step_that_nobody_left_lets_go(cache):
    lease = cache.acquire([1, 2, 3])
    table = radixkv._core.PageTable(cache)
    step = step_over(cache, [lease], table).__enter__()
    with pytest.raises(radixkv.LeaseError, match="another step"):
        step_over(cache, [cache.acquire([9])], table).__enter__()
    del step
    lease.extend([4])
    with step_over(cache, [lease], table):
        pass
    assert lease.num_written == 4


def test_a_step_keeps_its_leases_alive(cache):
    table = radixkv._core.PageTable(cache)
    with step_over(cache, [cache.acquire([1, 2, 3]), cache.acquire([4])], table):
        gc.collect()
        assert cache.stats().num_leases == 2
        assert table.input_ids.tolist() == [1, 2, 3, 4]
    assert cache.stats().num_leases == 0  # they went with the step


def test_a_step_belongs_to_the_thread_that_entered_it(cache):
    lease = cache.acquire([1, 2, 3])
    step = step_over(cache, [lease]).__enter__()
    for end in ((None, None, None), (KeyError, KeyError(), None)):
        errors = []

        def leave(end=end, errors=errors):
            try:
                step.__exit__(*end)
            except radixkv.LeaseError as error:
                errors.append(str(error))

        thread = threading.Thread(target=leave)
        thread.start()
        thread.join()
        assert "the step belongs to another thread" in errors[0]
        assert step.is_open
    step.__exit__(None, None, None)
    assert lease.num_written == 3


def test_a_step_is_entered_once_at_a_time_and_left_as_often_as_one_likes(cache):
    lease = cache.acquire([1, 2])
    step = step_over(cache, [lease])
    with step:
        with pytest.raises(radixkv.LeaseError, match="open already"):
            step.__enter__()
        assert step.is_open
    step.__exit__(None, None, None)
    lease.extend([3])
    with step:
        assert lease.num_written == 2
    assert lease.num_written == 3


def test_a_lease_that_never_was_is_no_lease(cache):
    with pytest.raises(radixkv.InvalidArgument, match="a step takes leases"):
        step_over(cache, [radixkv.Lease.__new__(radixkv.Lease)]).__enter__()


# --- the engine's side -----------------------------------------------------------------------------------------------


def test_tokens_that_were_not_computed_are_not_published():
    engine = make_engine()
    lease = engine.acquire([1, 2, 3])
    with engine.step([lease]) as step:
        with pytest.raises(radixkv.LeaseError, match="in an open step"):
            lease.extend([4, 5])
        forward(step)
    assert lease.num_written == 3
    lease.release()
    assert engine.cache.match([1, 2, 3, 4, 5]) == 3


def test_a_lease_of_another_engine_is_refused():
    a, b = make_engine(), make_engine()
    lease = a.acquire([1, 2, 3])
    with pytest.raises(radixkv.InvalidArgument, match="lease 0 is of another cache"), b.step([lease]):
        pass
    with a.step([lease]) as step:
        forward(step)
    lease.release()
    assert (a.cache.match([1, 2, 3]), b.cache.match([1, 2, 3])) == (3, 0)


def test_what_another_request_has_by_then_is_not_written_to():
    engine = make_engine(num_pages=2, page_size=4)
    lease = engine.acquire([1, 2, 3])
    with engine.step([lease]) as step:
        x = embed(step.input_ids, step.positions, torch.float32)
        step.attend(0, *qkv(x, 0))
        with pytest.raises(radixkv.LeaseError, match="in an open step"):
            lease.release()
        with pytest.raises(radixkv.PoolExhausted):
            engine.acquire([7, 8, 9, 10, 11])
        for layer in (1, 2):
            step.attend(layer, *qkv(x, layer))
    lease.release()
    engine.cache.check()


class Interrupt(BaseException):
    """What a signal handler raises."""


def interrupted(call, n):
    """Runs `call`, with an Interrupt before the n-th bytecode of radixkv's Python. Whether it came to that."""
    left = n

    def trace(frame, event, _):
        nonlocal left
        if "radixkv" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.filterwarnings(
    "ignore:Exception ignored in.*gc_callback"
)  # Hypothesis's, where a collection comes in between
def test_a_signal_at_any_moment_leaves_nothing_locked():
    engine = make_engine()
    lease = engine.acquire([1, 2, 3])
    lease.advance(1)

    def call():
        with engine.step([lease]) as step:
            forward(step)

    n, kept = 0, []
    while interrupted(call, n):
        assert lease.num_written == 1
        lease.commit()  # it is in no step
        kept.append(engine.step([lease]))  # nor is the engine
        with pytest.raises(KeyError), kept.pop():
            raise KeyError
        n += 1
    assert n > 100
    assert lease.num_written == 3
    lease.release()
    engine.cache.check()


# --- what refers to what ---------------------------------------------------------------------------------------------


class Owner:
    """Somebody's engine: an object in a cycle with everything native that it holds."""

    def __init__(self):
        self.cache = Cache(8, 4)
        self.lease = self.cache.acquire([1, 2, 3])
        with self.cache.acquire([7]) as lease:
            lease.advance()
        self.pin = self.cache.pin([7])
        self.journal = self.cache.journal()
        self.step = step_over(self.cache, [self.lease]).__enter__()
        self.cache.owner = self


class Cache(radixkv.PrefixCache):
    """One that can hold a reference."""


def test_a_cycle_through_the_core_is_collected():
    owner = Owner()
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None


def test_a_cache_has_no_other_attributes(cache):
    assert weakref.ref(cache)() is cache
    with pytest.raises(AttributeError):
        cache.on_release = print  # a typo, or what older versions had: never silently nothing


# --- K and V that several layers attend to ----------------------------------------------------------------------------


def test_a_layer_without_k_and_v_attends_to_what_the_step_has_written():
    engine = make_engine()
    with engine.acquire(list(range(9))) as lease, engine.step([lease]) as step:
        x = embed(step.input_ids, step.positions, torch.float32)
        q, k, v = qkv(x, 0)
        want = step.attend(0, q, k, v)
        before = engine.pool.layers[0].k.view(torch.int32).clone()
        assert torch.equal(step.attend(0, q), want)
        assert torch.equal(step.attend(0, 2 * q, sm_scale=0.125), want)
        assert torch.equal(engine.pool.layers[0].k.view(torch.int32), before)
        for layer in (1, 2):
            step.attend(layer, *qkv(x, layer))


def test_k_and_v_that_no_layer_has_written_are_refused():
    engine = make_engine()
    with engine.acquire(list(range(9))) as lease:
        with engine.step([lease]) as step:
            x = embed(step.input_ids, step.positions, torch.float32)
            q, k, v = qkv(x, 0)
            for layer in range(3):
                step.attend(layer, q, k, v)
        lease.extend([1])
        refused = pytest.raises(radixkv.InvalidArgument, match="no k and v, but this step has written none")
        with refused, engine.step([lease]) as step:
            step.attend(0, q[:1])
        refused = pytest.raises(radixkv.InvalidArgument, match="layer 0 is given v alone")
        with refused, engine.step([lease]) as step:
            step.attend(0, q[:1], v=v[:1])
        assert lease.num_written == 9


def test_chunks_look_back_no_further_than_dropped_pages_allow():
    engine = make_engine(num_pages=160)
    size = engine.attention.view_unit
    lease = engine.acquire([1] * (size + 8))
    with engine.step([lease]) as step:
        forward(step)
    assert engine.drop(lease, 5) > 0
    lease.extend([2])
    with engine.step([lease]) as step:
        x = embed(step.input_ids, step.positions, torch.float32)
        q, k, v = qkv(x, 0)
        with pytest.raises(radixkv.InvalidArgument, match="window_left is 511, but a lease"):
            step.attend(0, q, k, v, attention_chunk=512)
        for layer in range(3):
            step.attend(layer, q, k, v, attention_chunk=6)
    lease.release()


def test_a_step_says_which_of_its_rows_are_of_content():
    """Of several leases, one of which finds a part of a picture; and none."""
    engine = make_engine()

    def step_through(step):
        x = torch.zeros(len(step.input_ids), *embed(torch.tensor([0]), torch.tensor([0]), torch.float32).shape[1:])
        for layer in range(len(engine.layers)):
            step.attend(layer, *qkv(x, layer))

    cat, dog = (radixkv.content_tokens(bytes([i]) * 32, 4).tolist() for i in range(2))
    with engine.acquire([1, 2, *cat, 3]) as lease, engine.step([lease]) as step:
        assert step.content_rows.tolist() == [2, 3, 4, 5]
        step_through(step)
    with (
        engine.acquire([*dog, 9]) as other,
        engine.acquire([1, 2, *cat[:3], 8, *dog]) as lease,
        engine.acquire([5, 6]) as text,
    ):
        assert lease.num_cached == 5
        with engine.step([text, lease, other]) as step:
            assert step.input_ids.tolist() == [5, 6, 8, *dog, *dog, 9]
            assert step.content_rows.tolist() == [3, 4, 5, 6, 7, 8, 9, 10]
            step_through(step)
        text.extend([7])
        with engine.step([text]) as step:
            assert step.content_rows.tolist() == []
            step_through(step)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("most", [1, 3, 7, 64])
def test_a_prompt_in_pieces_of_a_step_has_the_bits_of_one_that_is_computed_at_once(storage, most):
    torch.manual_seed(5)
    prompt, beside = torch.randint(0, 50, (43,)).tolist(), torch.randint(0, 50, (9,)).tolist()
    answers = []
    for rows in (None, most):
        engine = make_engine(**storage)
        long, short = engine.cache.acquire(prompt), engine.cache.acquire(beside)
        pieces = {long: [], short: []}
        while leases := [lease for lease in (long, short) if lease.num_written < lease.num_tokens]:
            with engine.step(leases, max_rows=rows) as step:
                out = forward(step)
            counts = torch.diff(step.last_rows, prepend=torch.tensor([-1])).tolist()
            assert sum(counts) == len(out)
            assert rows is None or max(counts) <= rows
            for lease, part in zip(leases, out.split(counts), strict=True):
                pieces[lease].append(part)
        answers.append(torch.cat([*pieces[long], *pieces[short]]))
        engine.cache.check()
    assert torch.equal(*answers)
