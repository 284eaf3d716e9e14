"""The LRU table on real traces, where they are at hand (see bench/cache/hit_rates.py for the whole table)."""

import pytest

from bench.cache import hit_rates, npz_traces
from radixkv.traces.curve import capacity_curve
from radixkv.traces.curve.clairvoyant import clairvoyant_hit_rates
from radixkv.traces.formats import read_trace
from radixkv.traces.replay import replay

FOLDER = npz_traces.traces_folder()
pytestmark = pytest.mark.skipif(FOLDER is None, reason="no traces: set RADIXKV_TRACES to the folder of the .npz files")

QUICK = ["mooncake_conv", "tau_airline", "react_hotpot", "bbh_zipf", "tot_game24", "cc_dev"]


@pytest.mark.parametrize("name", QUICK)
def test_the_curve_reproduces_the_table(name):
    expected = hit_rates.TABLE[name]
    curve = capacity_curve(npz_traces.read_npz(FOLDER / f"{name}.npz"), expected.page_size)
    for share, figure in zip(hit_rates.SHARES, expected.lru, strict=True):
        ours = 100 * curve.hit_rate(hit_rates.capacity_pages(curve, share))
        assert ours == pytest.approx(figure, abs=hit_rates.TOLERANCE), share
    capacities = [hit_rates.capacity_pages(curve, share) for share in hit_rates.BOUND_SHARES]
    requests = npz_traces.read_npz(FOLDER / f"{name}.npz")
    for bound, figure in zip(
        clairvoyant_hit_rates(requests, expected.page_size, capacities), expected.bound, strict=True
    ):
        assert 100 * bound == pytest.approx(figure, abs=hit_rates.TOLERANCE)


@pytest.mark.parametrize("name", ["tau_airline", "react_hotpot"])
def test_replay_equals_the_curve_at_ten_capacities(name):
    found = hit_rates.agreement(name, FOLDER / f"{name}.npz")
    assert len(set(found["capacity_pages"])) == 10
    assert found["curve_hit_tokens"] == found["replay_hit_tokens"]


def test_token_exact_reuse_gains():
    requests = list(npz_traces.read_npz(FOLDER / "tau_airline.npz", limit=1000))
    exact, aligned = (replay(requests, 60_000, 16, page_aligned) for page_aligned in (False, True))
    assert 0 < 100 * (exact.hit_rate - aligned.hit_rate) < 1


def test_the_mooncake_file_and_its_converted_form_agree():
    converted = capacity_curve(npz_traces.read_npz(FOLDER / "mooncake_conv.npz"), 512)
    original = capacity_curve(read_trace(str(FOLDER / "mooncake_conversation.jsonl")), 512)
    assert original.hits_by_rank.tolist() == converted.hits_by_rank.tolist()
    assert original.input_tokens == converted.input_tokens
