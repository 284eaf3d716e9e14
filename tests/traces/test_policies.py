"""What the policies give on a trace, and hints through replay."""

import pytest

from bench.cache import hit_rates, npz_traces, policies
from radixkv import InvalidArgument
from radixkv.traces.policies import LOSS, SHARES, Cell, Comparison, compare_policies
from radixkv.traces.replay import replay, session_ends
from radixkv.traces.request import TraceRequest
from radixkv.traces.workload import generate

FOLDER = npz_traces.traces_folder()


def request(tokens, session="", namespace=""):
    return TraceRequest(tokens, [], session=session, namespace=namespace)


def test_the_last_request_of_each_session_ends_it():
    requests = [request([1], "a"), request([2], "b"), request([3]), request([4], "a"), request([5], "a", "other")]
    assert session_ends(requests) == {1, 3, 4}


@pytest.mark.parametrize(
    ("requests", "why"),
    [
        ([request([1]), request([2])], "no request of this trace names its session"),
        ([request([1], "a"), request([2], "b")], "each request is a session of its own"),
    ],
)
def test_ends_are_never_guessed(requests, why):
    with pytest.raises(InvalidArgument, match=f"{why}: record it"):
        replay(requests, 100, 4, hints=True)
    assert compare_policies([request([1] * 8)] * 3, 4).no_hints.startswith("no request")


def test_hints_through_replay():
    """Two sessions of two turns; the second ends while the first goes on, in a cache with room for one and a half."""
    one, two = list(range(16)), list(range(100, 108))
    turns = [request(one[:8], "a"), request(two[:4], "b"), request([*two, 7], "b"), request([*range(200, 208)], "c")]
    turns += [request([*one, 7], "a"), request([300], "c")]
    plain, told = (replay(turns, 24, 4, hints=hints) for hints in (False, True))
    assert (plain.hints, told.hints) == (False, True)
    assert told.hit_tokens > plain.hit_tokens
    assert told.to_dict()["hints"] is True


def test_a_comparison_of_a_workload():
    requests = list(generate("chat", 300, seed=1))
    done = []
    found = compare_policies(requests, 16, lambda *told: done.append(told), shares=(5, 20))
    total = 10 * len(requests)  # the curve, the future, and of both shares the bound and three replays
    assert done == [(number, total) for number in range(1, total + 1)]
    for cell in found.cells:
        assert set(cell.rates) == {"lru", "hint", "hazard", "both"}
        assert all(rate <= cell.clairvoyant for rate in cell.rates.values())
        assert cell.gap == cell.clairvoyant - max(cell.rates.values()) >= 0
        assert cell.rates["hint"] > cell.rates["lru"]
    assert found.to_dict()["cells"][0]["percent_of_footprint"] == 5


def test_a_policy_that_loses_is_said_so():
    cells = [
        Cell(1, 10, {"lru": 0.5, "hazard": 0.5 - 2 * LOSS}, 0.9),
        Cell(2, 20, {"lru": 0.6, "hazard": 0.7}, 0.9),
    ]
    found = Comparison(5, 16, 100, cells, "no sessions")
    assert set(found.losing()) == {"hazard"}
    assert found.worst("hazard")[1] is cells[0]
    assert found.to_dict()["losing"]["hazard"]["capacity_pages"] == 10


def test_a_trace_that_fills_no_page():
    with pytest.raises(InvalidArgument, match="no request of the trace fills a page of 16 tokens"):
        compare_policies([request([1, 2, 3])], 16)


@pytest.mark.skipif(FOLDER is None, reason="no traces: set RADIXKV_TRACES to the folder of the .npz files")
@pytest.mark.parametrize("name", policies.HAZARD)
def test_the_policies_reproduce_the_table(name):
    requests = list(npz_traces.read_npz(FOLDER / f"{name}.npz"))
    shares = SHARES if name != "cc_dev" else (1, 5)  # the others take it a minute
    found = compare_policies(requests, hit_rates.TABLE[name].page_size, shares=shares)
    assert found.losing() == {}, "no policy is below LRU by more than 0.3 points anywhere"
    assert bool(found.no_hints) == (name not in policies.BOTH)
    assert [policies.faults(name, cell) for cell in found.cells] == [[]] * len(shares)


def test_a_cell_that_is_at_fault_is_found():
    rates = {"lru": 0.50, "hint": 0.49, "hazard": 0.3215, "both": 0.3}
    told = policies.faults("cc_dev", Cell(1, 10, rates, 0.9))
    assert told == [
        "both is below 32.4 by more than 0.3",
        "hint loses to LRU",
        "hazard loses to LRU",
        "both loses to LRU",
    ]
    assert policies.faults("cc_dev", Cell(1, 10, {**rates, "hazard": 0.31}, 0.9))[0].startswith("hazard is below 32.2")
