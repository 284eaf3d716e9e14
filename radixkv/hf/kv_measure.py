"""What a model's answers lose by how its K and V are stored: measured on a text, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from radixkv.cache import Lease
from radixkv.engine import Engine
from radixkv.errors import InvalidArgument
from radixkv.formats import LayerFormat
from radixkv.hf.adapter import AttentionShape, forward, probe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Loss", "Reference", "audit", "prefill"]

_ROWS = 256  # of logits at a time
_RUN = 64  # tokens of a run of greedy answers
_PAGE_SIZE = 16


@dataclass(frozen=True)
class Loss:
    """How far a model's distributions are from those with K and V in its own dtype, over `tokens` tokens of a text."""

    tokens: int
    kl_mean: float
    """Nats a token: KL(own dtype || format)."""
    kl_p99: float
    top1: float
    """Share of tokens whose likeliest next token is the same."""
    greedy_prefix: float
    """Of runs of 64 tokens, the mean share before the first whose likeliest next token differs."""
    perplexity: float
    """Relative change on the text: 0.01 is 1 % worse."""


def prefill(
    model: PreTrainedModel,
    shape: AttentionShape,
    tokens: Sequence[int],
    formats: Sequence[LayerFormat | None] | None,
) -> tuple[torch.Tensor, Engine, torch.Tensor]:
    """The logits of every token, [tokens, vocabulary] in fp32; the engine, and its pages with their K and V, in order.

    The pages are read back as every later request reads them: this is what a hit computes with.
    """
    num_pages = -(-len(tokens) // _PAGE_SIZE)
    engine = shape.engine(model.device, num_pages=num_pages, page_size=_PAGE_SIZE, kv_format=formats)
    with torch.inference_mode(), engine.acquire(tokens) as lease, engine.step([lease]) as step:
        rows = torch.arange(len(tokens), device=model.device)
        return forward(model, step, rows).float(), engine, torch.from_numpy(lease.pages.astype("int64"))


class Reference:
    """A model's own distributions over the second half of a text, which others are measured against.

    Memory: the logits of half of the tokens, 4 bytes a token and word of the vocabulary.
    """

    def __init__(self, model: PreTrainedModel, shape: AttentionShape, tokens: Sequence[int]) -> None:
        self.model, self.shape, self.tokens = model, shape, list(tokens)
        self.first = len(self.tokens) // 2
        logits, engine, pages = prefill(model, shape, self.tokens, None)
        self.keys = [kv.k[pages].flatten(0, 1)[: len(self.tokens)].float() for kv in engine.pool.layers]
        self.log_probs = logits[self.first :].log_softmax(-1)

    def loss(self, formats: Sequence[LayerFormat | None]) -> tuple[Loss, Engine]:
        """Of the model with its layers stored so; and the engine that was used."""
        logits, engine, _ = prefill(self.model, self.shape, self.tokens, formats)
        return self.loss_of(logits[self.first :]), engine

    def loss_of(self, logits: torch.Tensor) -> Loss:
        """logits: [second half of the tokens, vocabulary]."""
        kl, same, ours, its = [], [], [], []
        after = torch.tensor(self.tokens[self.first + 1 :], device=logits.device)
        for begin in range(0, len(logits), _ROWS):
            own, other = self.log_probs[begin : begin + _ROWS], logits[begin : begin + _ROWS].log_softmax(-1)
            kl.append((own.exp() * (own - other)).sum(-1).clamp(min=0).double())
            same.append(own.argmax(-1) == other.argmax(-1))
            words = after[begin : begin + _ROWS, None]
            ours.append(own[: len(words)].gather(-1, words).double())
            its.append(other[: len(words)].gather(-1, words).double())
        every, equal = torch.cat(kl), torch.cat(same)
        return Loss(
            tokens=len(every),
            kl_mean=float(every.mean()),
            kl_p99=float(every.quantile(0.99)),
            top1=float(equal.double().mean()),
            greedy_prefix=_prefix(equal),
            perplexity=float((torch.cat(ours).mean() - torch.cat(its).mean()).exp()) - 1,
        )


def _prefix(equal: torch.Tensor) -> float:
    shares = [float(run.long().cumprod(0).double().mean()) for run in torch.split(equal, _RUN)]
    return sum(shares) / len(shares)


def audit(model: PreTrainedModel, engine: Engine, lease: Lease) -> Loss:
    """What the engine's formats lose on a lease's own tokens: the only number here that means accuracy.

    Computes the lease's written tokens twice in engines of its own, in the model's dtype and in the engine's formats,
    whose pages hold the same bytes as the lease's. Losses are on the second half of the tokens. Changes nothing.
    Cost: two prefills, and the memory of `Reference`.

    Raises:
        InvalidArgument: fewer than 2 tokens are written, or the model is not the engine's.
    """
    tokens = lease.tokens[: lease.num_written].tolist()
    if len(tokens) < 2:
        raise InvalidArgument(f"the lease has {len(tokens)} written tokens: an audit needs 2 or more")
    shape = probe(model)
    if shape.layers != engine.layers or shape.dtype != engine.dtype:
        raise InvalidArgument(f"the engine is for other layers than those of {type(model).__name__}, or another dtype")
    return Reference(model, shape, tokens).loss([kv.format for kv in engine.pool.layers])[0]
