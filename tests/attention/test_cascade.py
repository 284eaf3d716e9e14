"""What requests share: derivation against a literal model, the choice of segments, the levels, the explanation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radixkv.attention.cascade import FLASHINFER, NATIVE, CascadeCosts, CascadePlan
from radixkv.errors import InvalidArgument
from tests.attention.cascade_helpers import ALL, Forest, ModelSegment, model_choice, random_forest


@st.composite
def forests(draw: st.DrawFn) -> Forest:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return random_forest(
        rng,
        requests=draw(st.integers(1, 14)),
        page_size=draw(st.sampled_from([1, 3, 16])),
        max_run=draw(st.sampled_from([2, 9])),
        max_private=draw(st.sampled_from([0, 5, 40])),
        row_choices=draw(st.sampled_from([[1], [1, 1, 2, 7], [1, 30, 70]])),
    )


costs = st.builds(
    CascadeCosts,
    min_users=st.integers(1, 4),
    min_tokens=st.integers(0, 40),
    launch_tokens=st.sampled_from([-1.0, 0.0, 10.0, 60.0]),
    merge_tokens=st.sampled_from([0.0, 1.0, 4.0]),
    max_levels=st.integers(0, 3),
    max_rows=st.sampled_from([0, 1, 16]),
    granularity=st.sampled_from([1, 4, 64]),
)


@settings(max_examples=600, deadline=None)
@given(forests(), costs)
def test_segments_are_what_a_literal_comparison_finds(forest: Forest, chosen: CascadeCosts) -> None:
    plan = CascadePlan.derive(forest.table(), forest.page_size, chosen)
    want = model_choice(forest, chosen)
    got = {
        ModelSegment(frozenset(s.users), s.page_begin, s.page_end): (s.first_page, s.level, s.used)
        for s in plan.segments
    }
    assert len(plan.segments) == len(got)
    assert got == want
    for index, s in enumerate(plan.segments):
        assert (s.parent is None) == (s.page_begin == 0)
        if s.parent is not None:
            above = plan.segments[s.parent]
            assert s.parent < index
            assert above.page_end == s.page_begin
            assert set(above.users) > set(s.users)


@settings(max_examples=300, deadline=None)
@given(forests(), costs)
def test_levels_hold_every_page_of_every_request_once(forest: Forest, chosen: CascadeCosts) -> None:
    plan = CascadePlan.derive(forest.table(), forest.page_size, chosen)
    total = sum(forest.rows)
    assert sorted(plan.order.tolist()) == list(range(len(forest.pages)))
    assert sorted(plan.rows.tolist()) == list(range(total))
    owner = np.repeat(np.arange(len(forest.rows)), forest.rows)[plan.rows]
    walked: list[list[int]] = [[] for _ in forest.pages]
    levels = plan.levels()
    for level in levels:
        assert all(array.dtype == np.int32 for array in level)
        assert level.qo_indptr[0] == 0
        assert level.qo_indptr[-1] == total
        assert level.kv_indptr[-1] == len(level.kv_indices)
        for g, last in enumerate(level.kv_last_page_len.tolist()):
            pages = level.kv_indices[level.kv_indptr[g] : level.kv_indptr[g + 1]].tolist()
            users = set(owner[level.qo_indptr[g] : level.qo_indptr[g + 1]].tolist())
            if level is not levels[-1]:
                assert last == (forest.page_size if pages else 0)
                assert len(users) >= (2 if pages else 1)
            else:
                (only,) = users
                assert last == (forest.lengths[only] - 1) % forest.page_size + 1
                assert (len(pages) - 1) * forest.page_size + last >= forest.rows[only]
            for b in users:
                walked[b] += pages
    assert walked == forest.pages
    assert len(levels) == 1 + max((s.level + 1 for s in plan.segments if s.used), default=0)
    assert plan.shared == (len(levels) > 1)


@settings(max_examples=300, deadline=None)
@given(forests(), st.integers(0, 150))
def test_levels_show_every_row_the_keys_of_its_window_once(forest: Forest, window: int) -> None:
    """Shared levels show all their keys, the last one those that the window leaves, counted from the last row back."""
    plan = CascadePlan.derive(forest.table(), forest.page_size, ALL)
    size, levels = forest.page_size, plan.levels(window)
    ends = np.cumsum(forest.rows)
    assert all(len(level.kv_indices) > 0 for level in levels[:-1])
    for place, row in enumerate(plan.rows.tolist()):
        request = int(np.searchsorted(ends, row, side="right"))
        position = forest.lengths[request] - int(ends[request]) + row
        seen: list[int] = []
        for level in levels:
            group = int(np.searchsorted(level.qo_indptr, place, side="right")) - 1
            pages = level.kv_indices[level.kv_indptr[group] : level.kv_indptr[group + 1]].tolist()
            slots = [page * size + offset for page in pages for offset in range(size)]
            if level is levels[-1]:
                length = (len(pages) - 1) * size + int(level.kv_last_page_len[group])
                at = length - int(level.qo_indptr[group + 1]) + place
                slots = slots[max(0, at - window) : at + 1]
            seen += slots
        mine = forest.pages[request]
        wanted = range(max(0, position - window), position + 1)
        assert seen == [mine[at // size] * size + at % size for at in wanted]


def test_what_a_window_leaves_of_a_chain_of_segments() -> None:
    """Segments over tokens 0 to 31, 32 to 47 and 48 to 63 of rows at position 70 (one at 68, which has the first)."""
    forest = Forest(
        [[0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [0, 1, 2, 6, 7], [0, 1, 8, 9, 10]], [71, 71, 71, 69], [1] * 4, 16
    )
    plan = CascadePlan.derive(forest.table(), 16, ALL)

    def shared(window: int) -> list[list[int]]:
        return [level.kv_indices.tolist() for level in plan.levels(window)[:-1]]

    assert shared(-1) == shared(70) == [[0, 1], [2], [3]]
    assert shared(69) == []  # cuts the first segment, and the others follow it
    assert shared(37) == []  # before all windows is the first, but the second is cut
    assert shared(36) == []
    assert shared(22) == [[3]]
    assert shared(21) == []
    assert [level.kv_indices.tolist() for level in plan.levels(22)][-1] == [4, 5, 6, 7, 8, 9, 10]


def chain(*pages: int, rows: int = 1, page_size: int = 16) -> tuple[list[int], int, int]:
    return list(pages), len(pages) * page_size, rows


def forest_of(*requests: tuple[list[int], int, int]) -> Forest:
    pages, lengths, rows = zip(*requests, strict=True)
    return Forest(list(pages), list(lengths), list(rows), 16)


def test_the_page_of_a_users_first_new_row_is_not_shared() -> None:
    """Even where two requests name the same page there, as no engine would."""
    same = forest_of(chain(5, 6, 7), chain(5, 6, 7))
    (segment,) = CascadePlan.derive(same.table(), 16, ALL).segments
    assert (segment.page_begin, segment.page_end) == (0, 2)
    wide = forest_of(chain(5, 6, 7), chain(5, 6, 7, rows=17), chain(5, 6, 7, rows=33))
    assert [s.page_end for s in CascadePlan.derive(wide.table(), 16, ALL).segments] == [1]


def test_equal_pages_after_different_ones_are_not_a_prefix() -> None:
    plan = CascadePlan.derive(forest_of(chain(1, 9, 3), chain(2, 9, 4)).table(), 16, ALL)
    assert plan.segments == ()
    assert not plan.shared
    assert plan.order.tolist() == [0, 1]
    assert "no two share a full page" in plan.explain()


def test_three_levels_and_two_families() -> None:
    forest = forest_of(
        chain(1, 2, 3, 10), chain(20, 21, 11), chain(1, 2, 3, 12), chain(1, 2, 13), chain(20, 21, 14), chain(1, 15),
        chain(40),
    )  # fmt: skip
    plan = CascadePlan.derive(forest.table(), 16, ALL, token_bytes=768)
    found = {(s.users, s.page_begin, s.page_end, s.level) for s in plan.segments}
    assert found == {((0, 2, 3, 5), 0, 1, 0), ((0, 2, 3), 1, 2, 1), ((0, 2), 2, 3, 2), ((1, 4), 0, 2, 0)}
    assert len(plan.levels()) == 4
    assert plan.tokens_saved == 16 * (3 + 2 + 1 + 2)
    lines = plan.explain().splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("7 requests, 4 shared segments, 4 used in 3 levels: a layer reads K and V of 192 tokens")
    assert lines[0].endswith("instead of 320, 96 KiB less")
    assert any("4 users (0, 2, 3, 5), pages 0 to 0, serves 16 tokens: used at level 0" in line for line in lines)


def test_every_reason_is_explained() -> None:
    shared = list(range(100))
    forest = Forest([[*shared, 100 + i] for i in range(3)], [1601] * 3, [1] * 3, 16)

    def reason(**changed: float) -> str:
        plan = CascadePlan.derive(forest.table(), 16, CascadeCosts(**changed))  # type: ignore[arg-type]
        return plan.explain().splitlines()[1].split("tokens: ", 1)[1]

    assert reason() == "used at level 0, saves reading 3200 tokens for the price of 544"
    assert reason(min_users=4) == "not used, too few users: 3, at least 4 wanted"
    assert reason(min_tokens=1601) == "not used, too short: 1600 tokens in units of 64, at least 1601 wanted"
    assert reason(launch_tokens=4e3) == "not used, does not pay: would save 3200 tokens for the price of 4480"
    deeper = Forest([[1, 2, 3], [1, 2, 4], [1, 5]], [33, 33, 17], [1] * 3, 16)
    limited = CascadeCosts(**{**vars(ALL), "max_levels": 1})
    assert "not used, too many levels: at most 1" in CascadePlan.derive(deeper.table(), 16, limited).explain()


def test_an_unused_segment_falls_to_those_below_it() -> None:
    """A short prefix of everybody's and a long one of two: the long one serves both."""
    a = [1, *range(10, 60)]
    forest = Forest([[*a, 2], [*a, 3], [1, 4]], [51 * 16 + 1] * 2 + [17], [1] * 3, 16)
    plan = CascadePlan.derive(forest.table(), 16, NATIVE)
    assert [(s.used, s.first_page, s.page_begin, s.level) for s in plan.segments] == [(False, 0, 0, 0), (True, 0, 1, 0)]
    assert not CascadePlan.derive(forest.table(), 16, FLASHINFER).shared


def test_a_table_that_no_backend_takes_is_refused() -> None:
    table = forest_of(chain(1, 2), chain(1, 3)).table()
    with pytest.raises(InvalidArgument, match="kv_last_page_len is 17"):
        CascadePlan.derive(table._replace(kv_last_page_len=np.array([16, 17], np.int32)), 16)
    with pytest.raises(InvalidArgument, match="page_size"):
        CascadePlan.derive(table, 0)
    with pytest.raises(InvalidArgument, match="granularity"):
        CascadePlan.derive(table, 16, CascadeCosts(granularity=0))
