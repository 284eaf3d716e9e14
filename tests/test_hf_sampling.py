"""Sampling: validated options, the right support, the right frequencies, one random number a token."""

import pytest
import torch

from radixkv import InvalidArgument
from radixkv.hf.sampling import Draw, Sampler, Sampling, sample
from tests.hf_helpers import VOCABULARY

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])


def draw_alone(sampler, logits, count):
    return [sample(logits[None], [Draw(0, sampler, i)])[0] for i in range(count)]


def draw(count, **options):
    return draw_alone(Sampler(Sampling(**options)), LOGITS, count)


def test_greedy_ignores_everything_else():
    assert draw(3, temperature=0.0, top_k=2, top_p=0.1, seed=9) == [1, 1, 1]


def test_frequencies_follow_the_softmax_at_the_temperature():
    drawn = torch.bincount(torch.tensor(draw(20_000, temperature=2.0, seed=1)), minlength=5) / 20_000
    torch.testing.assert_close(drawn, torch.softmax(LOGITS / 2, 0), atol=0.015, rtol=0)


def test_top_k_and_top_p_limit_the_support():
    assert set(draw(500, temperature=5.0, top_k=2)) == {1, 3}
    # softmax: 0.64, 0.24, 0.09, 0.03, 0.01 for tokens 1, 3, 2, 0, 4
    assert set(draw(500, temperature=1.0, top_p=0.6)) == {1}
    assert set(draw(500, temperature=1.0, top_p=0.8)) == {1, 3}
    # of the top two, 0.73 and 0.27, the first alone holds 0.7
    assert set(draw(500, temperature=1.0, top_k=2, top_p=0.7)) == {1}


def test_a_top_k_beyond_the_vocabulary_is_off():
    flat = torch.zeros(VOCABULARY)
    drawn = [
        draw_alone(Sampler(Sampling(temperature=1.0, top_k=k, seed=2)), flat, 1)
        for k in (0, VOCABULARY, 10 * VOCABULARY)
    ]
    assert drawn[0] == drawn[1] == drawn[2]


def test_a_vanishing_temperature_is_greedy_and_not_a_nan():
    assert set(draw(20, temperature=1e-300)) == {1}


def test_equal_seeds_draw_equal_tokens_and_each_token_takes_one_number():
    assert draw(50, temperature=3.0, seed=4) == draw(50, temperature=3.0, seed=4)
    assert draw(50, temperature=3.0, seed=4) != draw(50, temperature=3.0, seed=5)
    narrow, wide = Sampler(Sampling(temperature=3.0, seed=4)), Sampler(Sampling(temperature=3.0, seed=4))
    sample(LOGITS[None, :2], [Draw(0, narrow, 0)])
    sample(LOGITS[None], [Draw(0, wide, 0)])
    again = [[sample(LOGITS[None], [Draw(0, sampler, i)]) for i in range(1, 31)] for sampler in (narrow, wide)]
    assert again[0] == again[1]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": 2**64},
        {"seed": None},
        {"top_k": 2.0},
        {"top_p": "1"},
        {"temperature": True},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InvalidArgument, match=next(iter(options))):
        Sampling(**options)
