"""Speculative decoding on SmolLM2-135M in fp32: tokens a step and time, without guesses and with prompt lookup.

    python -m bench.end_to_end.drafts [--draft-tokens 4 8] [--json]

The demo's conversations, and a prompt that asks for a copy; one request at a time, greedy, on one thread. Times are CPU
seconds of decoding: the first token of each answer, and the prompt with it, is left out. The answers must be the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from bench.common.machine import conditions

if TYPE_CHECKING:
    from radixkv.hf import Generator

COPY = """Repeat this text word for word.

Article 1. The library lends books to everybody who lives in the town. A book is lent for four weeks.
Article 2. A book that is not asked for by another reader is lent for four more weeks, if its reader asks for it.
Article 3. A book that is late costs its reader ten cents a day. A book that is lost costs what a new one costs.
Article 4. The library is open from Monday to Friday from nine to six, and on Saturday from nine to one."""


def conversations(tokenizer: Any) -> list[list[int]]:
    """Every prompt of the demo: each user's questions so far, with an answer of one word between them."""
    from radixkv.demo import scenario
    from radixkv.demo.conversation import _encode, _opening

    prompts = []
    for user in scenario.USERS:
        history = _opening()
        for question in user.questions:
            history.append({"role": "user", "content": question})
            prompts.append(_encode(tokenizer, history))
            history.append({"role": "assistant", "content": "Yes."})
    return prompts


def decode(generator: Generator, prompts: list[list[int]], count: int) -> dict[str, Any]:
    """Answer each prompt; the figures of all, and the answers."""
    seconds, requests = 0.0, []
    for prompt in prompts:
        request = generator.submit(prompt, max_new_tokens=count)
        while not request.tokens:
            generator.step()
        start = time.process_time()
        generator.run()
        seconds += time.process_time() - start
        requests.append(request)
    generated = sum(len(request.tokens) - 1 for request in requests)
    accepted = sum(request.stats.accepted_tokens for request in requests)
    drafted = sum(request.stats.drafted_tokens for request in requests)
    return {
        "tokens": generated,
        "tokens_a_step": generated / (generated - accepted),
        "right": accepted / drafted if drafted else None,
        "ms_a_token": 1e3 * seconds / generated,
        "answers": [request.tokens for request in requests],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    import torch

    from radixkv.demo.model import find_model, load_model
    from radixkv.hf import Generator, engine_for

    torch.set_num_threads(1)
    model, tokenizer = load_model(find_model(None), torch.float32, lambda line: print(line, file=sys.stderr))
    template = tokenizer.apply_chat_template(
        [{"role": "user", "content": COPY}], add_generation_prompt=True, tokenize=False
    )
    workloads = {
        "the demo's conversations": (conversations(tokenizer), 48),
        "a copy": ([tokenizer.encode(template, add_special_tokens=False)], 160),
    }
    engine = engine_for(model, num_pages=400)
    found: dict[str, Any] = {}
    answers: dict[str, list[list[list[int]]]] = {name: [] for name in workloads}
    for name, (prompts, count) in workloads.items():
        for draft_tokens in (0, *options.draft_tokens):
            drafts: dict[str, Any] = {"draft": "prompt-lookup", "draft_tokens": draft_tokens} if draft_tokens else {}
            with Generator(model, engine, **drafts) as generator:
                figures = decode(generator, prompts, count)
            answers[name].append(figures.pop("answers"))
            found[f"{name}, {draft_tokens}"] = figures
    equal = all(answer == same[0] for same in answers.values() for answer in same)
    return report(found, equal, options.json)


def report(found: dict[str, Any], equal: bool, as_json: bool) -> int:
    if as_json:
        print(json.dumps(conditions("bench.end_to_end.drafts") | {"equal": equal} | found))
    else:
        for name, figures in found.items():
            right = "" if figures["right"] is None else f", {figures['right']:.0%} of the guesses right"
            print(
                f"{name} guesses: {figures['tokens_a_step']:.2f} tokens a step, "
                f"{figures['ms_a_token']:.1f} ms of CPU time a token{right}"
            )
        print("the answers are the same" if equal else "the answers DIFFER")
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
