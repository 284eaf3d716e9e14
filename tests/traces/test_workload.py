"""Workloads: the same for the same seed, plausible in shape, with the prefix sharing that they are for."""

import hashlib

import pytest

from radixkv import InvalidArgument
from radixkv.traces.curve import capacity_curve
from radixkv.traces.workload import VOCABULARY, WORKLOADS, generate

KINDS = sorted(WORKLOADS)


def digest(requests):
    state = hashlib.sha256()
    for request in requests:
        state.update(repr((request.session, request.timestamp)).encode())
        state.update(request.tokens_in.tobytes() + b"|" + request.tokens_out.tobytes())
    return state.hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_everything(kind):
    assert digest(generate(kind, 50, seed=4)) == digest(generate(kind, 50, seed=4))
    assert digest(generate(kind, 50, seed=4)) != digest(generate(kind, 50, seed=5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_workload_begins_with_the_shorter_one(kind):
    assert digest(list(generate(kind, 80))[:30]) == digest(generate(kind, 30))


@pytest.mark.parametrize("kind", KINDS)
def test_requests_are_well_formed_and_in_time_order(kind):
    requests = list(generate(kind, 400))
    assert len(requests) == 400
    times = [request.timestamp for request in requests]
    assert times == sorted(times)
    assert len({request.session for request in requests}) > 10
    for request in requests:
        assert request.num_in >= 1
        assert request.num_out >= 1
        for tokens in (request.tokens_in, request.tokens_out):
            assert tokens.dtype == "int32"
            assert 0 <= tokens.min() <= tokens.max() < VOCABULARY


@pytest.mark.parametrize("kind", ["agent", "chat"])
def test_a_session_goes_on_from_its_last_output(kind):
    last, continued, retried = {}, 0, 0
    for request in generate(kind, 600):
        tokens = request.tokens_in.tolist()
        if request.session in last:
            before, output = last[request.session]
            assert tokens[: len(before)] == before
            if tokens == before:
                retried += 1
            else:
                assert tokens[: len(before + output)] == before + output
                continued += 1
        last[request.session] = (tokens, request.tokens_out.tolist())
    assert continued > 200
    assert (retried > 10) == (kind == "agent")


@pytest.mark.parametrize(
    ("kind", "least", "most"), [("chat", 0.8, 0.97), ("fewshot", 0.8, 0.97), ("agent", 0.85, 0.98)]
)
def test_prefixes_are_shared_and_size_matters(kind, least, most):
    curve = capacity_curve(generate(kind, 1000), 16)
    assert least < curve.hit_rate(curve.max_pages) < most
    assert curve.hit_rate(curve.distinct_pages // 50) < 0.8 * curve.hit_rate(curve.max_pages)


@pytest.mark.parametrize(("kind", "requests", "seed"), [("poem", 1, 0), ("chat", 0, 0), ("chat", 1, -1)])
def test_bad_arguments_are_refused(kind, requests, seed):
    with pytest.raises(InvalidArgument):
        generate(kind, requests, seed)
