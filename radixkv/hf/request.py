"""What `Generator.submit` hands out: a request of the scheduler, how its tokens are drawn and who is told of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from radixkv import scheduling
from radixkv.hf.sampling import Sampler
from radixkv.scheduling import RequestStats, Status

__all__ = ["OnLogits", "OnToken", "Request", "RequestStats", "Status", "Tokens"]

Tokens = list[int] | np.ndarray | torch.Tensor
"""A sequence of token ids: a list, or a one-dimensional integer array or CPU tensor."""

OnToken = Callable[["Request", int], object]
"""Called with the request and each of its new tokens, in order."""

OnLogits = Callable[["Request", torch.Tensor], object]
"""Called with the request and the logits `[vocabulary]` of each of its new tokens, in order."""


@dataclass(eq=False, kw_only=True)
class Request(scheduling.Request):
    """A request handed out by `Generator.submit`. Read it at any time; only the generator changes it."""

    sampler: Sampler = field(repr=False)
    on_token: OnToken | None = field(repr=False)
    on_logits: OnLogits | None = field(repr=False)
