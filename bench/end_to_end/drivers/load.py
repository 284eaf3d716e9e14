"""The model for the contenders that are transformers, and what they share."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from bench.end_to_end.measure import Mark
from bench.end_to_end.workload import Workload


def hf_model(work: Workload) -> Any:
    """SmolLM2-135M in bf16, with `sdpa` attention, on `work.threads` threads."""
    torch.set_num_threads(work.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        work.folder, dtype=torch.bfloat16, local_files_only=True
    ).eval()


class FirstToken:
    """A streamer that calls `mark` when the first new token is known: generate() puts the prompt first."""

    def __init__(self, mark: Mark) -> None:
        self.mark, self.puts = mark, 0

    def put(self, value: torch.Tensor) -> None:
        self.puts += 1
        if self.puts == 2:
            self.mark()

    def end(self) -> None:
        pass


def greedy(new: int) -> dict[str, Any]:
    """Options of generate(): `new` greedy tokens, whatever they are."""
    return {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 2}
