"""Sampling: validated options, the right support, the right frequencies, one random number a token, in any batch."""

import random

import pytest
import torch

from radixkv import InvalidArgument
from radixkv.hf.sampling import Draw, Sampler, Sampling, likeliest, sample
from tests.hf.helpers import VOCABULARY

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])


def draw_alone(sampler, logits, numbers):
    return [sample(logits[None], [Draw(0, sampler, number)])[0][0] for number in numbers]


def draw(count, **options):
    return draw_alone(Sampler(Sampling(**options)), LOGITS, range(count))


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
        draw_alone(Sampler(Sampling(temperature=1.0, top_k=k, seed=2)), flat, [0])
        for k in (0, VOCABULARY, 10 * VOCABULARY)
    ]
    assert drawn[0] == drawn[1] == drawn[2]


def test_a_vanishing_temperature_is_greedy_and_not_a_nan():
    assert set(draw(20, temperature=1e-300)) == {1}


def test_equal_seeds_draw_equal_tokens_and_each_token_takes_one_number():
    assert draw(50, temperature=3.0, seed=4) == draw(50, temperature=3.0, seed=4)
    assert draw(50, temperature=3.0, seed=4) != draw(50, temperature=3.0, seed=5)
    narrow, wide = Sampler(Sampling(temperature=3.0, seed=4)), Sampler(Sampling(temperature=3.0, seed=4))
    draw_alone(narrow, LOGITS[:2], [0])
    draw_alone(wide, LOGITS, [0])
    assert draw_alone(narrow, LOGITS, range(1, 31)) == draw_alone(wide, LOGITS, range(1, 31))


def literal(logits, sampling, number):
    """The token for one row as `Sampling` says it: sort everything, cut, and draw."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits.to(torch.float64)
    weights = torch.softmax((logits - logits.max()) / sampling.temperature, dim=0)
    tokens = torch.arange(len(weights))
    if sampling.top_k or sampling.top_p < 1:
        weights, tokens = weights.sort(descending=True, stable=True)
        if sampling.top_k:
            weights, tokens = weights[: sampling.top_k], tokens[: sampling.top_k]
        before = weights.cumsum(0) - weights
        weights = weights[: int((before < sampling.top_p * weights.sum()).sum())]
    cumulative = weights.cumsum(0)
    place = torch.searchsorted(cumulative, number * cumulative[-1], right=True)
    return int(tokens[place.clamp(max=len(weights) - 1)])


def random_sampling(chance):
    return Sampling(
        temperature=chance.choice([0.0, 0.0, 0.3, 1.0, 8.0]),
        top_k=chance.choice([0, 0, 1, 7, 40, 10_000]),
        top_p=chance.choice([1.0, 1.0, 0.9, 0.5, 1e-6]),
        seed=chance.randrange(5),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocabulary", [1, 97, 3000])
@pytest.mark.parametrize("kind", ["normal", "ties", "flat"])
@pytest.mark.parametrize("seed", range(2))
def test_a_token_drawn_in_a_batch_is_the_one_drawn_alone(dtype, vocabulary, kind, seed):
    """Any mixture of settings, rows that serve several requests or none, tokens of any number in their request."""
    chance = random.Random(f"{dtype} {vocabulary} {kind} {seed}")
    logits = torch.randn(40, vocabulary, generator=torch.Generator().manual_seed(seed))
    logits = {"normal": 3 * logits, "ties": (2 * logits).round(), "flat": 0 * logits}[kind].to(dtype)
    settings = [random_sampling(chance) for _ in range(50)]
    together, alone = ([Sampler(sampling) for sampling in settings] for _ in range(2))
    numbers = [torch.Generator().manual_seed(sampling.seed) for sampling in settings]
    for number in range(3):
        rows = [chance.randrange(len(logits)) for _ in settings]
        draws = list(zip(rows, together, [number] * len(rows), strict=True))
        tokens = sample(logits, [Draw(*draw) for draw in draws])
        assert tokens == [sample(logits[[row]], [Draw(0, s, number)])[0] for row, s in zip(rows, alone, strict=True)]
        drawn = [torch.rand((), generator=g, dtype=torch.float64) for g in numbers]
        assert tokens == [[literal(logits[row], *of)] for row, *of in zip(rows, settings, drawn, strict=True)]


@pytest.mark.parametrize("seed", range(8))
def test_top_p_that_cuts_exactly_between_two_tokens(seed):
    """There the order of a sum decides which token is the last, so everything is sorted and summed in order."""
    weights = torch.softmax(3 * torch.randn(4000, generator=torch.Generator().manual_seed(seed)).double(), 0)
    falling = weights.sort(descending=True).values
    before = falling.cumsum(0) - falling
    for cut in range(1, 400, 3):
        top_p = float(before[cut] / falling.sum())
        kept = int((before < top_p * falling.sum()).sum())
        assert torch.equal(likeliest(weights, Sampling(1.0, top_p=top_p)), falling[:kept])


def test_a_token_asked_for_again_takes_the_same_number():
    once, twice = (Sampler(Sampling(temperature=3.0, seed=4)) for _ in range(2))
    expected = draw_alone(once, LOGITS, range(20))
    assert draw_alone(twice, LOGITS, [i // 2 for i in range(40)])[1::2] == expected


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
