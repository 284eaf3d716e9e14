"""Speculative decoding: the same tokens as without, in fewer steps where text repeats."""

import logging
import random

import numpy as np
import pytest
import torch

from radixkv import InvalidArgument
from radixkv.content import content_tokens
from radixkv.hf import Generator, engine_for, forward
from radixkv.hf.draft import PromptLookup
from radixkv.hf.sampling import Draw, Sampler, Sampling, sample
from radixkv.scheduling import Request as Plain
from tests.hf.helpers import VOCABULARY, assert_drains, random_prompts, stock_tokens, tiny

COUNT = 16


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def prompts():
    first, second, third = random_prompts(11, 6, 9, seed=8)
    return [first, second * 3, third + third[:4]]


@pytest.fixture
def make(model):
    made = []

    def make(num_pages=100, **options):
        made.append(Generator(model, engine_for(model, num_pages=num_pages, page_size=4), **options))
        return made[-1]

    yield make
    for generator in made:
        generator.close()
        assert_drains(generator.engine)


def oracle(luck, answers):
    """Guesses what the answer will be, each token wrong now and then."""

    def draft(request):
        chance = random.Random(request.id)
        answer = answers[request.prompt.tobytes()]
        return lambda count: [
            token if chance.random() < luck else chance.randrange(VOCABULARY)
            for token in answer[len(request.tokens) : len(request.tokens) + count]
        ]

    return draft


def run(generator, prompts, **options):
    requests = [generator.submit(prompt, max_new_tokens=COUNT, **options) for prompt in prompts]
    generator.run()
    return [sibling for request in requests for sibling in request.siblings]


def known(prompts, answers):
    return {np.asarray(prompt, np.int32).tobytes(): answer for prompt, answer in zip(prompts, answers, strict=True)}


# --- the same tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("luck", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_pages", [100, 16])
def test_greedy_answers_are_those_of_transformers(make, model, prompts, luck, num_pages):
    answers = [stock_tokens(model, prompt, COUNT) for prompt in prompts]
    generator = make(num_pages, draft=oracle(luck, known(prompts, answers)))
    assert [request.tokens for request in run(generator, prompts)] == answers
    lookup = run(make(num_pages, draft="prompt-lookup", draft_tokens=3), prompts)
    assert [request.tokens for request in lookup] == answers


OPTIONS = {
    "sampled": {"temperature": 0.9, "seed": 5},
    "top-k and top-p": {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "seed": 2},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "siblings": {"temperature": 1.0, "seed": 9, "n": 3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("luck", [0.5, 1.0])
def test_seeded_answers_are_those_without(make, prompts, options, luck):
    expected = run(make(), prompts, logprobs=2, **options)
    answers = [request.tokens for request in expected if request.siblings[0] is request]
    found = run(make(draft=oracle(luck, known(prompts, answers))), prompts, logprobs=2, **options)
    assert [request.tokens for request in found] == [request.tokens for request in expected]
    if luck == 1.0:
        assert found[0].stats.accepted_tokens == 2 + 4 + 6
    for one, other in zip(found, expected, strict=True):
        assert [entry.token for entry in one.logprobs] == one.tokens
        assert [e.logprob for e in one.logprobs] == pytest.approx([e.logprob for e in other.logprobs], abs=1e-4)


def test_processors_are_called_as_without(make, prompts):
    def calls(**options):
        seen = []

        def processor(input_ids, scores):
            seen.append(input_ids[0].tolist())
            return scores

        (request,) = run(make(**options), prompts[1:2], processors=[processor])
        return request.tokens, seen

    expected, seen = calls()
    for luck in (0.6, 1.0):
        assert calls(draft=oracle(luck, known(prompts[1:2], [expected]))) == (expected, seen)


def test_a_processor_that_raises_later_keeps_what_came_before(make, prompts):
    (expected,) = run(make(), prompts[:1])

    def processor(input_ids, scores):
        if input_ids.shape[1] == len(prompts[0]) + 5:
            raise ValueError("at the fifth")
        return scores

    generator = make(draft=oracle(1.0, known(prompts[:1], [expected.tokens])))
    request = generator.submit(prompts[0], max_new_tokens=COUNT, processors=[processor])
    with pytest.raises(ValueError, match="at the fifth"):
        generator.run()
    assert (request.status, request.tokens) == ("error", expected.tokens[:5])


def test_callbacks_get_every_token_with_its_logits(make, prompts):
    (expected,) = run(make(), prompts[:1])
    told, best = [], []
    run(
        make(draft=oracle(1.0, known(prompts[:1], [expected.tokens]))),
        prompts[:1],
        on_token=lambda request, token: told.append(token),
        on_logits=lambda request, logits: best.append(int(logits.argmax())),
    )
    assert told == best == expected.tokens


# --- the rule of acceptance -------------------------------------------------------------------------------------------


def test_a_guess_is_accepted_as_often_as_it_is_likely_and_else_the_rest_is_drawn():
    """Rejection sampling by the book: p(guess) of the time, and what is drawn instead follows p without the guess.

    What comes after an accepted guess follows the next row.
    """
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(3))
    p, after = torch.softmax(logits.double() / 0.8, 1)
    guess, count = 2, 20_000
    firsts, seconds = [], []
    for seed in range(count):
        sampler = Sampler(Sampling(temperature=0.8, seed=seed))
        tokens = sample(logits, [Draw(0, sampler, 0, [guess])])[0]
        assert (len(tokens) == 2) == (tokens[0] == guess)
        firsts.append(tokens[0])
        seconds += tokens[1:]
    for drawn, expected in ((firsts, p), (seconds, after)):
        shares = torch.bincount(torch.tensor(drawn), minlength=6).double() / len(drawn)
        spread = (expected * (1 - expected) / len(drawn)).sqrt()
        assert bool(((shares - expected).abs() < 5 * spread).all())


# --- fewer steps ------------------------------------------------------------------------------------------------------


def test_right_guesses_take_fewer_steps(make, model, prompts):
    answer = stock_tokens(model, prompts[0], COUNT)
    generator = make(draft=oracle(1.0, known(prompts[:1], [answer])), draft_tokens=5)
    request = generator.submit(prompts[0], max_new_tokens=COUNT)
    steps = 0
    while generator.step():
        steps += 1
    assert steps + 1 == 1 + 4  # a token; then three, five and six; and the last
    assert request.tokens == answer
    assert generator.engine.cache.match([*prompts[0], *answer]) == len(prompts[0]) + COUNT - 1


def test_fewer_guesses_are_made_while_they_are_wrong(make, model, prompts):
    answer = stock_tokens(model, prompts[0], COUNT)
    generator = make(draft=oracle(0.0, known(prompts[:1], [[(token + 1) % VOCABULARY for token in answer]])))
    request = generator.submit(prompts[0], max_new_tokens=COUNT)
    generator.run()
    assert request.stats.drafted_tokens <= 2 + (COUNT - 3)  # two, and then one a step


def test_logits_of_all_rows(model, prompts):
    engine = engine_for(model, num_pages=50, page_size=4)
    with engine.acquire(prompts[0]) as first, engine.acquire(prompts[1]) as second, torch.inference_mode():
        with engine.step([first, second]) as step:
            every = forward(model, step, torch.arange(len(step.input_ids)))
            last = step.last_rows.tolist()
        assert every.shape == (len(prompts[0]) + len(prompts[1]), VOCABULARY)
    model.set_attn_implementation("eager")
    for prompt, rows in zip(prompts[:2], every.tensor_split(last[:1] and [last[0] + 1]), strict=True):
        assert torch.allclose(rows, model(torch.tensor([prompt])).logits[0], atol=1e-4)


# --- guessers ---------------------------------------------------------------------------------------------------------


def literal(tokens, count):
    """What follows the last earlier place with the same last three tokens, or two; over its end it repeats."""
    for length in (3, 2):
        for at in range(len(tokens) - 1, length - 1, -1):
            if tokens[at - length : at] == tokens[-length:]:
                found = tokens[at : at + count]
                return [found[i % len(found)] for i in range(count)]
    return []


@pytest.mark.parametrize("top", [1, 2**8, 2**30 - 1])
def test_prompt_lookup_against_a_literal_search(top):
    chance = random.Random(top)
    kinds = [chance.randint(0, top) for _ in range(3)]
    for _ in range(200):
        request = Plain([chance.choice(kinds) for _ in range(chance.randint(1, 30))])
        lookup = PromptLookup(request)
        for _ in range(10):
            tokens = [*request.prompt.tolist(), *request.tokens]
            count = chance.randint(1, 9)
            assert lookup(count) == literal(tokens, count)
            request.tokens += [chance.choice(kinds) for _ in range(chance.randint(1, 4))]


def test_prompt_lookup_guesses_no_pictures():
    picture = content_tokens(bytes(16), 2).tolist()
    assert PromptLookup(Plain([5, 6, 7, *picture, 8, 5, 6]))(4) == [7]
    assert PromptLookup(Plain([5, 6, *picture, 8, 5, 6]))(4) == []


@pytest.mark.parametrize(
    "guesser", [lambda count: 1 / 0, lambda count: [VOCABULARY], lambda count: ["a"], lambda count: 5, None]
)
def test_a_broken_guesser_is_logged_and_costs_nothing_else(make, model, prompts, guesser, caplog):
    generator = make(draft=lambda request: guesser if guesser is not None else "no function")
    with caplog.at_level(logging.ERROR, "radixkv"):
        requests = run(generator, prompts)
    assert [r.tokens for r in requests] == [stock_tokens(model, prompt, COUNT) for prompt in prompts]
    assert [record.message for record in caplog.records] == [
        f"the guesser of request {i} raised: it goes on without" for i in range(len(prompts))
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "prompt"}, "draft is 'prompt': give 'prompt-lookup', a function"),
        ({"draft": 5}, "draft is 5"),
        ({"draft": "prompt-lookup", "draft_tokens": 0}, "draft_tokens is 0: give at least 1"),
    ],
)
def test_bad_options(model, options, message):
    with pytest.raises(InvalidArgument, match=message):
        Generator(model, engine_for(model, num_pages=10), **options)
