"""SmolLM2-135M with K and V in each format: how far its answers go from its own, memory, and time.

    python -m bench.end_to_end.formats [--dtype bfloat16] [--new-tokens 48] [--json]

The demo's seven prompts and thirteen more questions over its system prompt, one request at a time, greedy, on one
thread. The model with K and V in its own dtype answers first. Then every format is led along those answers, token by
token, over its own K and V from the first token of the prompt on: an answer of it is the same as long as its likeliest
tokens are. KL is over the tokens of the answers, in nats; times are CPU seconds, medians over the requests.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

from bench.common.machine import conditions
from bench.end_to_end.drafts import conversations

if TYPE_CHECKING:
    import torch

    from radixkv.hf import Generator

FORMATS = ("int8", "fp8_rotated", "k8v4", "fp8", "int4")
QUESTIONS = (
    "How long are books lent?", "What does a lost card cost?", "Where is the piano?", "How many films are there?",
    "Can I eat in the courtyard?", "When is story time?", "Who runs the workshop?", "What does a colour copy cost?",
    "How late is the library open on Friday?", "How many people fit into the lecture hall?", "Is a library card free?",
    "What is in the workshop?", "When does the writers' circle meet?",
)  # fmt: skip


def prompts_of(tokenizer: Any) -> list[list[int]]:
    from radixkv.demo.conversation import _encode, _opening

    asked = [[*_opening(), {"role": "user", "content": question}] for question in QUESTIONS]
    return conversations(tokenizer) + [_encode(tokenizer, messages) for messages in asked]


def led_by(prompt: list[int], answer: list[int]) -> Any:
    """A processor that leaves of each token's scores only that of the answer."""

    def lead(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at = answer[tokens.shape[1] - len(prompt)]
        only = scores.new_full(scores.shape, float("-inf"))
        only[0, at] = scores[0, at]
        return only

    return lead


def answer(
    generator: Generator, prompt: list[int], count: int, lead: list[int] | None
) -> tuple[list[int], torch.Tensor, float, float]:
    """The tokens, their log-probabilities [tokens, vocabulary], CPU seconds of the first token and of a later one."""
    import torch

    rows: list[torch.Tensor] = []
    request = generator.submit(
        prompt, max_new_tokens=count if lead is None else len(lead), stop_tokens=None if lead is None else (),
        processors=[] if lead is None else [led_by(prompt, lead)], on_logits=lambda _, row: rows.append(row.clone()),
    )  # fmt: skip
    start = time.process_time()
    while not request.tokens:
        generator.step()
    first = time.process_time()
    generator.run()
    later = (time.process_time() - first) / max(1, len(request.tokens) - 1)
    return request.tokens, torch.stack(rows).float().log_softmax(-1), first - start, later


def compare(own: list[Any], led: list[Any]) -> dict[str, Any]:
    """How far the formats' distributions are from the model's own, along the same tokens."""
    import torch

    kl = torch.cat([(a[1].exp() * (a[1] - b[1])).sum(-1).clamp(min=0) for a, b in zip(own, led, strict=True)])
    same = [a[1].argmax(-1) == b[1].argmax(-1) for a, b in zip(own, led, strict=True)]
    return {
        "tokens": len(kl),
        "kl_mean": kl.mean().item(),
        "kl_p99": kl.quantile(0.99).item(),
        "top1": torch.cat(same).double().mean().item(),
        "answers_equal": sum(bool(s.all()) for s in same),
        "equal_before_first": statistics.mean(s.long().cumprod(0).double().mean().item() for s in same),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the model")
    parser.add_argument("--new-tokens", type=int, default=48, help="of each answer, at most")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    import torch

    from radixkv.demo.model import find_model, load_model
    from radixkv.hf import Generator, engine_for

    torch.set_num_threads(1)
    dtype = getattr(torch, options.dtype)
    model, tokenizer = load_model(find_model(None), dtype, lambda text: print(text, file=sys.stderr))
    prompts = prompts_of(tokenizer)
    own: list[Any] = []
    found = []
    for name in (None, *FORMATS):
        engine = engine_for(model, num_pages=400, kv_format=name)
        with Generator(model, engine) as generator:
            leads = [None] * len(prompts) if name is None else [tokens for tokens, *_ in own]
            runs = [answer(generator, p, options.new_tokens, lead) for p, lead in zip(prompts, leads, strict=True)]
        own = own or runs
        figures = {
            "format": name or options.dtype, "bytes_a_token": engine.pool.page_bytes // engine.page_size,
            **compare(own, runs), "answers": len(runs), "first_token_cold_s": runs[0][2],
            "first_token_s": statistics.median(run[2] for run in runs[1:]),
            "ms_a_token": 1e3 * statistics.median(run[3] for run in runs),
        }  # fmt: skip
        found.append(figures)
        if not options.json:
            print(
                "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()),
                flush=True,
            )
    if options.json:
        print(json.dumps(conditions("bench.end_to_end.formats") | {"results": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
