"""The capacity curve equals replay at every capacity, and the clairvoyant bound is one."""

import io
import xml.etree.ElementTree as ET
from math import log10

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radixkv import InvalidArgument
from radixkv.traces.curve import capacity_curve
from radixkv.traces.curve.clairvoyant import clairvoyant_hit_rates
from radixkv.traces.curve.pages import page_keys
from radixkv.traces.curve.picture import Drawn, Memory, curves_svg
from radixkv.traces.replay import replay
from radixkv.traces.request import Blocks, TraceRequest
from radixkv.traces.workload import generate
from tests.cache.page_lru import PageLru
from tests.traces.trace_strategies import traces

CAPACITIES = [*range(1, 15), 20, 40, 200]


def hits(requests, pages, page_size, **options):
    return replay(requests, pages * page_size, page_size, page_aligned=True, **options).hit_tokens


@settings(deadline=None, max_examples=200)
@given(traces(), st.integers(1, 4))
def test_curve_equals_replay_at_every_capacity(requests, page_size):
    curve = capacity_curve(requests, page_size)
    for pages in CAPACITIES:
        assert curve.hit_tokens(pages) == hits(requests, pages, page_size), pages


@settings(deadline=None, max_examples=60)
@given(traces(), st.integers(1, 4))
def test_curve_equals_the_literal_model(requests, page_size):
    curve = capacity_curve(requests, page_size)
    for pages in CAPACITIES:
        assert curve.hit_tokens(pages) == hits(requests, pages, page_size, make_cache=PageLru), pages


@pytest.mark.parametrize("kind", ["chat", "fewshot", "agent"])
def test_curve_equals_replay_on_workloads(kind):
    requests = list(generate(kind, 300, seed=5))
    for page_size in (16, 64):
        curve = capacity_curve(requests, page_size)
        for share in (0.02, 0.05, 0.1, 0.3, 0.6, 1.0):
            pages = int(curve.distinct_pages * share)
            assert curve.hit_tokens(pages) == hits(requests, pages, page_size)


def block_trace(rng, unit, count=60):
    """Block ids that are prefix-chained: an id stands for its whole prefix."""
    number, requests = {}, []
    for i in range(count):
        path = tuple(rng.integers(0, 2, size=rng.integers(0, 6)).tolist())
        ids = [number.setdefault(path[: n + 1], len(number)) for n in range(len(path))]
        length = len(ids) * unit + int(rng.integers(0 if ids else 1, unit))
        requests.append(TraceRequest(blocks=Blocks(np.array(ids, dtype=np.int32), unit, length, 10_000 + i)))
    return requests


@pytest.mark.parametrize("page_size", [1, 2, 3, 4, 8, 12, 16])
def test_block_ids_give_the_curve_of_their_tokens(page_size):
    blocks = block_trace(np.random.default_rng(0), unit=8)
    plain = [TraceRequest(request.tokens_in) for request in blocks]
    a, b = capacity_curve(blocks, page_size), capacity_curve(plain, page_size)
    assert a.hits_by_rank.tolist() == b.hits_by_rank.tolist()
    assert (a.distinct_pages, a.input_tokens) == (b.distinct_pages, b.input_tokens)
    for pages in (1, 5, 20):
        assert a.hit_tokens(pages) == hits(blocks, pages, page_size)


def test_page_keys_take_one_value_a_page_where_the_ids_fit():
    request = TraceRequest(blocks=Blocks(np.array([1, 2], dtype=np.int32), 4, 11, 9))
    assert [page_keys(request, page)[1] for page in (1, 2, 4, 3, 8)] == [1, 1, 1, 3, 8]
    assert page_keys(request, 2)[0].tolist() == [1, 1, 2, 2, 9]
    assert page_keys(request, 4)[0].tolist() == [1, 2]


def test_a_mixture_of_tokens_and_ids_is_refused():
    mixture = [TraceRequest([1] * 8), TraceRequest(blocks=Blocks(np.array([1], dtype=np.int32), 4, 4))]
    with pytest.raises(InvalidArgument, match="mixes"):
        capacity_curve(mixture, 4)


def test_requests_below_a_page_count_as_input_and_never_hit():
    curve = capacity_curve([TraceRequest([1, 2, 3])] * 5, 4)
    assert (curve.requests, curve.input_tokens, curve.distinct_pages, curve.max_pages) == (5, 15, 0, 0)
    assert curve.hit_rate(10) == 0.0
    assert capacity_curve([], 4).hit_rate(5) == 0.0


@settings(deadline=None, max_examples=60)
@given(traces(), st.integers(1, 3))
def test_no_capacity_of_lru_exceeds_the_clairvoyant_bound(requests, page_size):
    curve = capacity_curve(requests, page_size)
    bounds = clairvoyant_hit_rates(requests, page_size, CAPACITIES)
    for pages, bound in zip(CAPACITIES, bounds, strict=True):
        assert curve.hit_rate(pages) <= bound + 1e-12
    assert bounds == sorted(bounds)
    assert bounds[-1] == pytest.approx(curve.hit_rate(curve.max_pages))


def test_the_clairvoyant_bound_keeps_what_comes_back_soonest():
    a, b, c = ([n] * 4 + [99] for n in range(3))
    requests = [TraceRequest(tokens) for tokens in (a, b, c, a, b, c)]
    assert capacity_curve(requests, 4).hit_tokens(2) == 0, "LRU gives up each page just before it is needed"
    assert clairvoyant_hit_rates(requests, 4, [1, 2, 3]) == pytest.approx([0.0, 8 / 30, 12 / 30])


def test_page_sizes_below_one_are_refused():
    for function in (capacity_curve, lambda requests, page: clairvoyant_hit_rates(requests, page, [1])):
        with pytest.raises(InvalidArgument):
            function([TraceRequest([1])], 0)


@pytest.fixture(scope="module")
def curve():
    return capacity_curve(generate("chat", 300, seed=2), 16)


def test_points_are_the_capacities_where_the_rate_changes(curve):
    points = curve.points()
    assert points[0] == (0, 0.0)
    assert points[-1] == (curve.max_pages, curve.hit_rate(curve.max_pages))
    rates = dict(points)
    rate = 0.0
    for pages in range(curve.max_pages + 3):
        assert curve.hit_rate(pages) == rates.get(pages, rate)
        rate = curve.hit_rate(pages)
    with pytest.raises(InvalidArgument):
        curve.hit_rate(-1)


@pytest.mark.parametrize("most", [2, 3, 10, 50, 10**6])
def test_fewer_points_keep_the_ends(curve, most):
    points = curve.points(most)
    assert len(points) <= most
    assert points[0] == (0, 0.0)
    assert points[-1] == curve.points()[-1]
    assert points == sorted(set(points))
    with pytest.raises(InvalidArgument):
        curve.points(1)


def test_csv_holds_every_point(curve):
    stream = io.StringIO()
    curve.to_csv(stream)
    header, *rows = stream.getvalue().splitlines()
    assert header == "capacity_pages,capacity_tokens,hit_tokens,hit_rate"
    assert len(rows) == len(curve.points())
    for row in rows[:: max(1, len(rows) // 50)]:
        pages, tokens, hit_tokens, rate = row.split(",")
        assert (int(tokens), int(hit_tokens)) == (int(pages) * 16, curve.hit_tokens(int(pages)))
        assert float(rate) == pytest.approx(curve.hit_rate(int(pages)), abs=1e-6)


SVG = "{http://www.w3.org/2000/svg}"


def drawn(*curves, **more):
    """(all texts, {class: d of the first path of it}) of a picture."""
    root = ET.fromstring(curves_svg(curves, **more))
    paths = {}
    for path in root.iter(SVG + "path"):
        paths.setdefault(path.get("class"), path.get("d"))
    return [element.text for element in root.iter(SVG + "text")], paths


def test_svg_is_a_picture_with_both_axes(curve):
    text, paths = drawn(Drawn("chat", curve), title="chat <1> & more")
    assert {"chat <1> & more", "hit rate (% of input tokens)", "10k", "0", "100"} <= set(text)
    assert list(paths) == ["lru c0"]
    assert paths["lru c0"].count("V") > 50


def test_bounds_and_hints_are_lines_with_a_dot_where_they_are_known(curve):
    bound, told = [(20, 0.3), (5, 0.2), (curve.max_pages, 0.8)], [(10, 0.25), (40, 0.4), (0, 0.0), (10**9, 1.0)]
    text, paths = drawn(Drawn("chat", curve, bound, told))
    assert paths["clairvoyant c1"].count("L") == 2
    lefts = [float(place.split(",")[0]) for place in paths["clairvoyant c1"][1:].split("L")]
    assert lefts == sorted(lefts)
    assert paths["hints c2"].count("L") == 1, "what lies beyond the axis is not drawn"
    assert [paths[f"dots c{i}"].count("h0") for i in (1, 2)] == [3, 2]
    assert {"clairvoyant", "LRU with hints"} <= set(text)


def test_several_traces_have_a_colour_each(curve):
    other = capacity_curve(generate("agent", 50, seed=2), 16)
    text, paths = drawn(Drawn("chat", curve, [(5, 0.2)]), Drawn("agent", other, [(5, 0.3)]))
    assert {"lru c0", "lru c1", "clairvoyant c0", "clairvoyant c1"} <= set(paths)
    assert text.count("chat") == text.count("agent") == text.count("clairvoyant") == 1
    for curves in (
        [],
        [Drawn("a", curve)] * 9,
        [Drawn("a", curve), Drawn("b", capacity_curve([TraceRequest([1])], 4))],
    ):
        with pytest.raises(InvalidArgument, match="1 to 8 curves of one page size"):
            curves_svg(curves)


def test_a_second_axis_is_memory(curve):
    text, _ = drawn(Drawn("chat", curve), memory=Memory(131_072, "llama-3-8b in bf16"))
    assert "above: memory for llama-3-8b in bf16, 128 KiB a token" in text
    assert {"10 MiB", "1 GiB"} <= set(text)
    root = ET.fromstring(curves_svg([Drawn("chat", curve)], memory=Memory(1024, "a model")))
    at = {element.text: float(element.get("x")) for element in root.iter(SVG + "text")}
    assert at["10 MiB"] == pytest.approx(at["10k"] + (at["10k"] - at["1k"]) * log10(1.024), abs=0.2)


@pytest.mark.parametrize("requests", [[], [TraceRequest([1, 2, 3, 4, 5])] * 2])
@pytest.mark.parametrize("memory", [None, Memory(131_072, "a model")])
def test_svg_of_almost_nothing(requests, memory):
    drawn(Drawn("none", capacity_curve(requests, 4)), memory=memory)
