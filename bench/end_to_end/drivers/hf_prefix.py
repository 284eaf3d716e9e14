"""The prefix-reuse recipe of transformers' documentation: the system prompt's DynamicCache, computed once, copied.

One by one: a deep copy of it for each request. All at once: copied and repeated over the batch.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache

from bench.end_to_end.drivers.load import FirstToken, greedy, hf_model
from bench.end_to_end.measure import Mark
from bench.end_to_end.workload import Workload


class Prefix:
    def __init__(self, model: Any) -> None:
        self.model = model

    def begin(self, system: list[int]) -> None:
        self.cache = DynamicCache(config=self.model.config)
        with torch.no_grad():
            self.model(torch.tensor([system]), past_key_values=self.cache, logits_to_keep=1)

    def serve(self, prompt: list[int], new: int, mark: Mark) -> list[int]:
        ids = torch.tensor([prompt])
        past = copy.deepcopy(self.cache)
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=past, streamer=FirstToken(mark), **greedy(new)
        )
        return list(out[0, len(prompt) :].tolist())

    def serve_all(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        past = copy.deepcopy(self.cache)
        past.batch_repeat_interleave(len(prompts))
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=past, **greedy(new))
        return list(out[:, ids.shape[1] :].tolist())


def make(work: Workload) -> Prefix:
    return Prefix(hf_model(work))
