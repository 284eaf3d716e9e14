"""transformers' generate: each prompt computed whole; all at once as one batch (of equal length: nothing is padded)."""

from __future__ import annotations

from typing import Any

import torch

from bench.end_to_end.drivers.load import FirstToken, greedy, hf_model
from bench.end_to_end.measure import Mark
from bench.end_to_end.workload import Workload


class Plain:
    def __init__(self, model: Any) -> None:
        self.model = model

    def begin(self, system: list[int]) -> None:
        pass

    def serve(self, prompt: list[int], new: int, mark: Mark) -> list[int]:
        ids = torch.tensor([prompt])
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), streamer=FirstToken(mark), **greedy(new))
        return list(out[0, len(prompt) :].tolist())

    def serve_all(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), **greedy(new))
        return list(out[:, ids.shape[1] :].tolist())


def make(work: Workload) -> Plain:
    return Plain(hf_model(work))
