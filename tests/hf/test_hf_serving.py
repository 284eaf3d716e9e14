"""What serving needs: text and stop strings, log-probabilities, processors, penalties, the generation config."""

import asyncio
import importlib.util
import random

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from radixkv import InvalidArgument, InvalidLogits
from radixkv.hf import AsyncGenerator, Generator, Sampling, engine_for
from radixkv.hf.sampling import Draw, Sampler, sample
from radixkv.scheduling import space
from tests.hf.helpers import VOCABULARY, assert_drains, random_prompts, stock_tokens, tiny, transformers

COUNT = 12
SAID = "Hello wörld 🙂🙂, to be or not to be.\n\nThe END, or so. STOP!"


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(11, 5, 14, 9, seed=8)


def byte_tokenizer():
    """A token for each byte of `SAID`, so that characters are spread over tokens, and one special token."""
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = sorted(set("".join(piece for piece, _ in bytes_.pre_tokenize_str(SAID))))
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = bytes_, decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    assert tokenizer.get_vocab_size() < VOCABULARY
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def generator(model, tokenizer):
    generator = Generator(model, engine_for(model, num_pages=200, page_size=4), tokenizer=tokenizer)
    yield generator
    generator.close()
    assert_drains(generator.engine)


class Says:
    """A processor that leaves one token: the next of a text."""

    def __init__(self, tokens, prompt):
        self.tokens, self.start = tokens, len(prompt)

    def __call__(self, input_ids, scores):
        only = torch.full_like(scores, -torch.inf)
        only[0, self.tokens[input_ids.shape[1] - self.start]] = 0
        return only


def say(generator, text, prompt=(1, 2, 3), **options):
    tokens = text if isinstance(text, list) else generator.tokenizer.encode(text).ids
    options = {"max_new_tokens": len(tokens), **options}
    return generator.submit(list(prompt), processors=[Says(tokens, prompt)], **options)


# --- text and stop strings --------------------------------------------------------------------------------------------


def test_text_comes_in_whole_characters(generator):
    request = say(generator, SAID)
    pieces = list(generator.text(request))
    assert "".join(pieces) == request.text == SAID
    assert "🙂" in pieces
    assert len(request.tokens) == len(SAID.encode())


def test_special_tokens_and_what_stopped_it_are_not_text(generator, tokenizer):
    end = tokenizer.token_to_id("<end>")
    ids = tokenizer.encode("to be").ids
    ended = say(generator, [*ids, end, *ids], stop_tokens=[end])
    passed = say(generator, [*ids, end, *ids], stop_tokens=[])
    letter = say(generator, "to be", stop_tokens=[ids[3]])
    generator.run()
    assert (ended.text, ended.status, ended.tokens[-1]) == ("to be", "stop", end)
    assert passed.text == "to beto be"
    assert letter.text == "to "


def literal_stop(text, stops):
    """What is before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        cuts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if cuts:
            return text[: min(cuts)]
    return text


@pytest.mark.parametrize(
    "stops", [["END"], ["\n\n"], ["🙂,"], ["nowhere"], ["STOP!x"], ["or so. STO", "or not"], ["be.", "to be.\n"], ["!"]]
)
def test_a_stop_string_ends_a_request_wherever_it_is_cut(generator, stops):
    request = say(generator, SAID, stop_strings=stops)
    seen = ""
    for piece in generator.text(request):
        seen += piece
        assert SAID.startswith(seen), "nothing is told that a stop string takes back"
    cut = literal_stop(SAID, stops)
    assert seen == request.text == cut
    assert request.status == ("length" if cut == SAID else "stop")
    if cut != SAID and stops != ["!"]:
        assert len(request.tokens) < len(SAID.encode()), "and no step is taken after it"


@pytest.mark.parametrize("seed", range(30))
def test_random_stop_strings(generator, seed):
    chance = random.Random(seed)
    text = "".join(chance.choice("to be\n") for _ in range(60))
    stops = ["".join(chance.choice("to be\n") for _ in range(chance.randint(1, 5))) for _ in range(3)]
    request = say(generator, text, stop_strings=stops)
    generator.run()
    assert request.text == literal_stop(text, stops)


def test_each_of_n_samples_has_its_own_text(generator):
    first = say(generator, "to be or not", n=3, stop_strings=["not"])
    generator.run()
    assert [sibling.text for sibling in first.siblings] == ["to be or "] * 3


def test_a_tokenizer_of_transformers_is_taken_and_another_refused(model, tokenizer):
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    generator = Generator(model, engine_for(model, num_pages=50), tokenizer=fast)
    request = say(generator, "to be")
    generator.run()
    assert request.text == "to be"
    with pytest.raises(InvalidArgument, match="tokenizer is 'gpt2'"):
        Generator(model, engine_for(model, num_pages=50), tokenizer="gpt2")
    plain = Generator(model, engine_for(model, num_pages=50))
    with pytest.raises(InvalidArgument, match="text needs a tokenizer"):
        plain.text(plain.submit([1]))


def test_text_as_it_comes_in_asyncio(model, tokenizer):
    prompt = [1, 2, 3]

    async def main():
        async with AsyncGenerator(model, engine_for(model, num_pages=100), tokenizer=tokenizer) as generator:
            options = {"processors": [Says(tokenizer.encode(SAID).ids, prompt)], "max_new_tokens": len(SAID.encode())}
            stream = generator.text(prompt, stop_strings=["so. STOP"], **options)
            return [piece async for piece in stream]

    assert "".join(asyncio.run(main())) == SAID[: SAID.index("so. STOP")]


# --- log-probabilities ------------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_models_own_logits(generator, prompts):
    rows = []
    request = generator.submit(
        prompts[0],
        temperature=2.0,
        logprobs=3,
        seed=5,
        on_logits=lambda _, row: rows.append(row.clone()),
        max_new_tokens=8,
    )
    greedy = generator.submit(prompts[1], logprobs=0, max_new_tokens=4)
    other = generator.submit(prompts[2], max_new_tokens=4)
    generator.run()
    assert [entry.token for entry in request.logprobs] == request.tokens
    for entry, row in zip(request.logprobs, rows, strict=True):
        expected = row.log_softmax(0)
        assert entry.logprob == pytest.approx(float(expected[entry.token]), abs=1e-5)
        assert list(entry.top) == expected.topk(3).indices.tolist()
        assert list(entry.top.values()) == sorted(entry.top.values(), reverse=True)
    assert [entry.top for entry in greedy.logprobs] == [{}] * 4
    assert other.logprobs == []


# --- processors, penalties, min_p -------------------------------------------------------------------------------------


def stock(model, prompt, count, **options):
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    output = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, **options)
    model.set_attn_implementation(before)
    return output[0, len(prompt) :].tolist()


def test_processors_of_transformers_give_the_tokens_of_transformers(model, generator, prompts):
    processors = transformers.LogitsProcessorList(
        [transformers.NoRepeatNGramLogitsProcessor(2), transformers.SuppressTokensLogitsProcessor([5, 6, 7])]
    )
    expected = [stock(model, prompt, COUNT, logits_processor=processors) for prompt in prompts]
    plain = [stock_tokens(model, prompt, COUNT) for prompt in prompts]
    both = [[generator.submit(p, max_new_tokens=COUNT, processors=used) for p in prompts] for used in (processors, [])]
    generator.run()
    assert [request.tokens for request in both[0]] == expected
    assert [request.tokens for request in both[1]] == plain
    assert expected != plain


def test_a_repetition_penalty_is_that_of_transformers(model, generator, prompts):
    expected = [stock(model, prompt, COUNT, repetition_penalty=1.7) for prompt in prompts]
    requests = [generator.submit(prompt, max_new_tokens=COUNT, repetition_penalty=1.7) for prompt in prompts]
    generator.run()
    assert [request.tokens for request in requests] == expected
    assert expected != [stock_tokens(model, prompt, COUNT) for prompt in prompts]


def test_presence_and_frequency_are_taken_from_what_was_generated(generator):
    flat = [torch.zeros(1, VOCABULARY)]
    flat[0][0, :3] = torch.tensor([3.0, 2.5, 1.0])
    sampler = Sampler(Sampling(presence_penalty=0.3, frequency_penalty=0.4), torch.tensor([0, 0, 1]).numpy(), 8)
    tokens = []
    for number in range(6):
        [[token]] = sample(flat[0], [Draw(0, sampler, number)])
        sampler.accept(token)
        tokens.append(token)
    # 0: 3.0, then 2.3, 1.9, 1.5; 1: 2.5, then 1.8, 1.4; 2: 1.0
    assert tokens == [0, 1, 0, 0, 1, 0]


def test_min_p_leaves_what_is_likely_enough():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0]])  # of the likeliest: 0.05, 1, 0.14, 0.37, 0.02

    def support(**options):
        sampler = Sampler(Sampling(temperature=1.0, **options))
        return {sample(logits, [Draw(0, sampler, number)])[0][0] for number in range(600)}

    assert support(min_p=0.3) == {1, 3}
    assert support(min_p=0.1) == {1, 2, 3}
    assert support(min_p=1.0) == {1}
    assert support(min_p=0.1, top_k=2) == {1, 3}
    assert support(min_p=0.1, top_p=0.7) == {1, 3}


@pytest.mark.parametrize(
    "options", [{"min_p": 0.05}, {"min_p": 0.2, "repetition_penalty": 1.3}, {"presence_penalty": 1.0}]
)
def test_seeded_results_do_not_depend_on_the_batch_or_on_preemption(model, prompts, options, monkeypatch):
    monkeypatch.setattr(space, "HEADROOM", 0)

    def run(num_pages, alone):
        generator = Generator(model, engine_for(model, num_pages=num_pages, page_size=4))
        requests = []
        for prompt in prompts:
            requests.append(generator.submit(prompt, max_new_tokens=30, temperature=1.2, seed=3, logprobs=2, **options))
            if alone:
                generator.run()
        generator.run()
        return requests

    alone, together, tight = run(200, True), run(200, False), run(14, False)
    assert sum(request.stats.preemptions for request in tight) > 0
    for requests in (together, tight):
        assert [request.tokens for request in requests] == [request.tokens for request in alone]
        assert all(len(request.logprobs) == 30 for request in requests)


def test_a_processor_that_leaves_no_token_is_told(generator, prompts):
    generator.submit(prompts[0], processors=[lambda ids, scores: torch.full_like(scores, -torch.inf)])
    with pytest.raises(InvalidLogits, match="a processor left no token"):
        generator.run()


# --- the generation config --------------------------------------------------------------------------------------------


@pytest.fixture
def configured():
    def make(**config):
        model = tiny()
        for name, value in config.items():
            setattr(model.generation_config, name, value)
        return Generator(model, engine_for(model, num_pages=100))

    return make


def test_what_the_generation_config_says_is_the_default(configured):
    generator = configured(
        do_sample=True, temperature=0.6, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.1, max_new_tokens=7,
        eos_token_id=[3, 4], max_time=60.0, max_length=100,
    )  # fmt: skip
    request = generator.submit([1, 2])
    sampling = request.sampler.sampling
    assert sampling == Sampling(0.6, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.1)
    assert (request.max_new_tokens, request.stop_tokens, request.deadline) == (7, frozenset({3, 4}), 60.0)
    assert generator.max_length == 100
    own = generator.submit([1, 2], temperature=0, top_k=0, repetition_penalty=1, max_new_tokens=5, stop_tokens=())
    assert own.sampler.sampling == Sampling(0, top_p=0.9, min_p=0.05)
    assert (own.max_new_tokens, own.stop_tokens) == (5, frozenset())


def test_temperature_without_do_sample_is_greedy_as_in_transformers(configured):
    assert configured(temperature=0.6).submit([1]).sampler.sampling.temperature == 0
    assert configured(do_sample=True).submit([1]).sampler.sampling.temperature == 1


@pytest.mark.parametrize(
    ("name", "value", "off"),
    [("num_beams", 4, 1), ("no_repeat_ngram_size", 3, 0), ("suppress_tokens", [5], []), ("min_new_tokens", 5, 0)],
)
def test_what_would_change_the_answer_and_is_not_done_is_refused(configured, name, value, off):
    with pytest.raises(InvalidArgument, match=f"generation_config asks for {name}=.*set it to None.*processors="):
        configured(**{name: value})
    generator = configured(**{name: off})
    setattr(generator.model.generation_config, name, value)
    with pytest.raises(InvalidArgument, match=name):
        generator.submit([1])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("eos_token_id", VOCABULARY, r"generation_config.eos_token_id\[0\] is 97: give at most 96"),
        ("eos_token_id", [1.5], r"generation_config.eos_token_id\[0\] is 1.5"),
        ("eos_token_id", "x", "generation_config.eos_token_id is 'x'"),
        ("stop_strings", 5, "stop_strings is 5"),
        ("max_length", "x", "generation_config.max_length is 'x'"),
        ("max_new_tokens", 0, "max_new_tokens is 0"),
        ("repetition_penalty", 0, "repetition_penalty is 0"),
    ],
)
def test_what_no_generation_config_may_say_is_refused(configured, name, value, message):
    with pytest.raises(InvalidArgument, match=message):
        configured(**{name: value}).submit([1])


def test_every_field_of_the_generation_config_was_thought_of():
    """A new one of transformers fails here: is it done, is it refused, or does it not change the tokens?"""
    from radixkv.hf.defaults import _REFUSED

    done = {
        "max_length", "max_new_tokens", "max_time", "stop_strings", "do_sample", "temperature", "top_k", "top_p",
        "min_p", "repetition_penalty", "eos_token_id",
    }  # fmt: skip
    changes_no_token = {
        "early_stopping", "length_penalty", "num_beam_groups", "low_memory", "renormalize_logits",
        "remove_invalid_values",
        "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "compile_config",
        "disable_compile", "continuous_batching_config", "output_attentions", "output_hidden_states", "output_scores",
        "output_logits", "return_dict_in_generate", "pad_token_id", "bos_token_id", "decoder_start_token_id",
        "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
        "assistant_ensemble_weight", "speculation_type", "use_mtp", "transformers_version",
    }  # fmt: skip
    fields = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    assert fields - done - changes_no_token - set(_REFUSED) == set()


# --- structured output, with llguidance -------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="llguidance is not installed")
def test_a_json_schema_is_kept_to_with_llguidance(model, tokenizer):
    import json

    import llguidance.hf
    import llguidance.torch

    letters = sorted(set('{"name": 0123456789,aged}'))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_letters(letters), eos_token="<end>", clean_up_tokenization_spaces=False
    )
    guide = llguidance.hf.from_tokenizer(fast, n_vocab=VOCABULARY)
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["adam", "eden"]}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)

    class Guided:
        def __init__(self):
            self.matcher, self.length = llguidance.LLMatcher(guide, grammar), None
            self.mask = llguidance.torch.allocate_token_bitmask(1, VOCABULARY)

        def __call__(self, input_ids, scores):
            if self.length is not None:
                self.matcher.consume_token(int(input_ids[0, -1]))
            self.length = input_ids.shape[1]
            llguidance.torch.fill_next_token_bitmask(self.matcher, self.mask)
            llguidance.torch.apply_token_bitmask_inplace(scores, self.mask)
            return scores

    generator = Generator(model, engine_for(model, num_pages=200), tokenizer=fast)
    end = fast.convert_tokens_to_ids("<end>")
    requests = [
        generator.submit(
            [1, 2, 3], max_new_tokens=80, temperature=2.0, seed=i, processors=[Guided()], stop_tokens=[end]
        )
        for i in range(8)
    ]
    generator.run()
    for request in requests:
        assert request.status == "stop", request.text
        answer = json.loads(request.text)
        assert answer["name"] in ("adam", "eden")
        assert 0 <= answer["age"] <= 120


def _letters(letters):
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found = sorted({piece for letter in [*letters, *"m"] for piece, _ in bytes_.pre_tokenize_str(letter)})
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(found)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = bytes_, decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return tokenizer
