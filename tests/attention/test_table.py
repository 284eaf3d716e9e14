"""The one page table: it points to the leases' pages, which nobody follows once the step has ended, and the cascade of
the step before is kept where the batch is the same one."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import radixkv
from radixkv import _core
from radixkv.attention import PageTable
from radixkv.attention.cascade import NATIVE, CascadeCosts, CascadePlan, core_costs
from radixkv.errors import InvalidArgument, LeaseError
from tests.attention.cascade_helpers import ALL
from tests.attention.helpers import Heads
from tests.attention.test_attention_errors import TABLE, backend_of, int32

ENDED = "the step of this page table has ended.*plan a table of an open step"


def small_engine(**sizes: Any) -> radixkv.Engine:
    sizes = {"num_pages": 64, "page_size": 4, "dtype": torch.float32} | sizes
    return radixkv.Engine(num_layers=1, num_qo_heads=2, num_kv_heads=1, head_dim=8, **sizes)


def attend(engine: radixkv.Engine, rows: int) -> torch.Tensor:
    """Append and run with the backend itself, past what Step checks."""
    kv, q = torch.ones(rows, 1, 8), torch.ones(rows, 2, 8)
    out = torch.full_like(q, torch.nan)
    engine.attention.append(0, kv, kv)
    engine.attention.run(0, q, out)
    return out


# --- after a step nobody follows its pointers -------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["left", "raised", "forgotten", "in another thread"])
def test_nothing_is_attended_once_the_step_has_ended(end: str) -> None:
    engine = small_engine()
    lease = engine.acquire([1, 2, 3, 4, 5])
    step = engine.step([lease])
    step.__enter__()
    assert not attend(engine, 5).isnan().any()
    if end == "left":
        step._attended(0)
        step.__exit__(None, None, None)
    elif end == "raised":
        step.__exit__(KeyError, KeyError(), None)
    elif end == "forgotten":
        del step
    else:
        steps = [step]
        del step
        thread = threading.Thread(target=steps.clear)
        thread.start()
        thread.join()
    lease.release()
    del lease
    gc.collect()
    before = [kv.k_pages.clone() for kv in engine.pool.layers]
    with pytest.raises(LeaseError, match=ENDED):
        attend(engine, 5)
    with pytest.raises(LeaseError, match=ENDED):
        engine.attention.run(0, torch.ones(5, 2, 8), torch.ones(5, 2, 8))
    assert all(torch.equal(kv.k_pages, old) for kv, old in zip(engine.pool.layers, before, strict=True))
    engine.attention.num_threads = 2  # schedules again: lengths alone
    for ask in (lambda: engine.attention.cascade, lambda: engine.table.kv_indices):
        with pytest.raises(LeaseError, match=ENDED):
            ask()
    with pytest.raises(LeaseError, match=ENDED):
        engine.attention.plan(engine.table)


def test_the_next_step_of_a_table_does_not_revive_the_last_plan() -> None:
    """Another backend planned a step of this table; its leases are gone, and the table is in use again."""
    engine = small_engine()
    other = backend_of(Heads(2, 1, 8), num_pages=64)
    lease = engine.acquire([1, 2, 3])
    with pytest.raises(KeyError), engine.step([lease]):
        other.plan(engine.table)
        raise KeyError
    lease.release()
    del lease
    with engine.step([engine.acquire([7, 8, 9])]) as step:
        kv = torch.ones(3, 1, 8)
        with pytest.raises(LeaseError, match=ENDED):
            other.append(0, kv, kv)
        step.attend(0, torch.ones(3, 2, 8), kv, kv)


def test_an_ended_step_waits_for_who_reads_its_pages() -> None:
    """A thread attends while another drops the step: what it reads stays until it is done."""
    engine = small_engine(num_pages=600)
    lease = engine.acquire(list(range(2000)))
    steps = [engine.step([lease])]
    steps[0].__enter__()
    outs: list[torch.Tensor] = []

    def work() -> None:
        for _ in range(50):
            try:
                outs.append(attend(engine, 2000))
            except LeaseError:
                return

    thread = threading.Thread(target=work)
    thread.start()
    while not outs:
        pass
    steps.clear()
    lease.release()
    thread.join()
    assert 0 < len(outs) <= 50
    assert all(torch.equal(out, outs[0]) for out in outs)
    with pytest.raises(LeaseError, match=ENDED):
        attend(engine, 2000)


def test_a_plan_that_was_asked_for_stays_valid() -> None:
    engine = small_engine()
    first = engine.acquire(list(range(20)))
    with engine.step([first]) as step:
        step._attended(0)
    first.commit()
    pair = [engine.acquire([*range(20), 50 + i]) for i in range(2)]
    with engine.step(pair) as step:
        plan = step.plan
        pages = [lease.pages.tolist() for lease in pair]
        step._attended(0)
    for lease in pair:
        lease.release()
    assert plan.core.kv_indices.tolist() == pages[0] + pages[1]
    assert "2 requests" in plan.explain()
    assert len(plan.levels()) >= 1


def test_a_table_is_of_the_pool_it_is_planned_for() -> None:
    engine = small_engine(num_pages=32)
    other = backend_of(Heads(2, 1, 8))
    with pytest.raises(KeyError), engine.step([engine.acquire([1])]):
        with pytest.raises(InvalidArgument, match="the page table is of 32 pages of 4 tokens: .* 8 of 4"):
            other.plan(engine.table)
        raise KeyError


def test_the_slots_of_a_table_of_arrays_are_those_of_its_pages() -> None:
    backend = backend_of()
    with pytest.raises(InvalidArgument, match=r"slots\[0\] is 3: request 0 .* belongs into slot 4"):
        backend.plan(TABLE._replace(slots=int32(3, 5, 0, 1, 2, 3)))


def test_a_steps_inputs_come_with_the_plan() -> None:
    engine = small_engine()
    with pytest.raises(KeyError), engine.step([engine.acquire([9, 8, 7]), engine.acquire([6])]) as step:
        inputs = engine.attention.plan(engine.table)
        assert [a.tolist() for a in inputs] == [[9, 8, 7, 6], [0, 1, 2, 0], [2, 3]]
        assert [a.tolist() for a in (step.input_ids, step.positions, step.last_rows)] == [a.tolist() for a in inputs]
        raise KeyError
    assert [len(a) for a in backend_of().plan(TABLE)] == [0, 0, 0]


# --- the cascade of one step after another ----------------------------------------------------------------------------

FIELDS = ("segments", "levels", "tokens_saved", "tokens_read")
ARRAYS = ("order", "shared_pages", "qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len")


def fields(core: _core.Cascade) -> dict[str, Any]:
    return {name: getattr(core, name) for name in FIELDS} | {name: getattr(core, name).tolist() for name in ARRAYS}


@settings(max_examples=250, deadline=None)
@given(st.data(), st.integers(1, 4), st.sampled_from([ALL, CascadeCosts(max_rows=2, min_tokens=2, granularity=1)]))
def test_a_kept_cascade_is_the_one_that_would_be_derived(
    data: st.DataObject, page_size: int, costs: CascadeCosts
) -> None:
    cache = radixkv.PrefixCache(200, page_size)
    table, finder = _core.PageTable(cache), _core.CascadeFinder(core_costs(costs))
    leases: list[radixkv.Lease] = []
    tokens = st.lists(st.integers(0, 1), min_size=1, max_size=14)
    for _ in range(data.draw(st.integers(2, 14))):
        for kind in data.draw(st.lists(st.sampled_from("acdfr"), max_size=2)):
            if kind == "a" or not leases:
                leases.append(cache.acquire(data.draw(tokens)))
                continue
            lease = data.draw(st.sampled_from(leases))
            if kind == "c":
                lease.commit()
            elif kind == "d":
                lease.drop(data.draw(st.integers(0, lease.num_written)))
            elif kind == "f" and lease.num_written == lease.num_tokens and not (lease.num_dropped or lease.copies):
                leases.append(lease.fork())
            elif kind == "r":
                leases.remove(lease)
                lease.release()
        if not leases:
            continue
        if data.draw(st.integers(0, 5)) == 0:
            leases = data.draw(st.permutations(leases))
        for lease in leases:
            rows = data.draw(st.sampled_from([1, 1, 1, 1, 3]))
            if lease.num_written == lease.num_tokens:
                lease.extend(data.draw(st.lists(st.integers(0, 1), min_size=rows, max_size=rows)))
        with _core.Step(table, leases, 0):
            kept = fields(finder.find(table))
            assert kept == fields(_core.CascadeFinder(core_costs(costs)).find(table))
            arrays = (table.qo_indptr, table.kv_indptr, table.kv_indices, table.kv_last_page_len, table.slots)
            assert kept == fields(CascadePlan.derive(PageTable(*arrays), page_size, costs).core)
            assert all(lease.pages.tolist() == mine.tolist() for lease, mine in pairs(leases, table))
    for lease in leases:
        lease.release()
    cache.check()


def pairs(leases: list[radixkv.Lease], table: _core.PageTable) -> Any:
    return zip(leases, np.split(table.kv_indices, table.kv_indptr[1:-1]), strict=True)


def test_costs_that_change_are_heeded() -> None:
    engine = small_engine(num_pages=200)
    first = engine.acquire(list(range(400)))
    first.advance()
    first.commit()
    leases = [engine.acquire([*range(400), 7]) for _ in range(3)]
    with pytest.raises(KeyError), engine.step(leases) as step:
        assert step.plan.shared
        engine.attention._plan.set_costs(core_costs(CascadeCosts(min_users=4)))  # type: ignore[attr-defined]
        engine.attention.plan(engine.table)
        assert not engine.attention.cascade.shared
        engine.attention._plan.set_costs(core_costs(NATIVE))  # type: ignore[attr-defined]
        engine.attention.plan(engine.table)
        assert engine.attention.cascade.shared
        raise KeyError
