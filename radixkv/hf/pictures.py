"""Pictures in prompts: each gets ids by what it shows, and the model gets its features where those ids stand.

For families whose text part sees a picture as so many rows of embeddings and as nothing else: each row at a position of
its own, causal, its features added nowhere but at the bottom.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from radixkv.content import content_tokens
from radixkv.errors import InvalidArgument, InvalidTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from radixkv.hf.request import Request
    from radixkv.step import Step

__all__ = ["FAMILIES", "Features", "Span", "embeddings", "place_pictures"]

FAMILIES = frozenset({"aya_vision", "cohere2_vision", "idefics3", "internvl", "llava", "qianfan_ocr", "smolvlm"})
"""Model types whose answers with pictures are equal to those of stock `generate`: the tests try each."""


class Features:
    """What the model makes of one picture. Computed when a row of it is first needed, and then kept."""

    def __init__(self, digest: bytes, inputs: Mapping[str, torch.Tensor]) -> None:
        self.digest = digest
        self._inputs = inputs
        self._rows: torch.Tensor | None = None

    def rows(self, model: PreTrainedModel, count: int) -> torch.Tensor:
        """`[count, hidden]`, for the `count` tokens that stand for the picture."""
        if self._rows is None:
            found = model.get_image_features(**self._inputs, return_dict=True).pooler_output
            self._rows = torch.cat(list(found)) if not isinstance(found, torch.Tensor) else found.flatten(0, -2)
        if len(self._rows) != count:
            raise InvalidTokens(
                f"the prompt has {count} placeholders for a picture of which the model makes {len(self._rows)} rows: "
                "use the input_ids of the model's own processor"
            )
        return self._rows


class Span(NamedTuple):
    """Where a picture stands in a prompt: positions `start` to `start + length`."""

    start: int
    length: int
    features: Features


def place_pictures(
    model: PreTrainedModel,
    prompt: np.ndarray,
    pictures: Sequence[Mapping[str, torch.Tensor]],
    known: MutableMapping[bytes, Features],
) -> tuple[np.ndarray, tuple[Span, ...]]:
    """The prompt with each picture's own ids in place of its placeholders, and where each picture stands.

    `known` has the features that other requests are about to compute, by digest.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise InvalidArgument(
            f"{type(model).__name__} cannot be given content: pictures are placed for {', '.join(sorted(FAMILIES))}; "
            "other families run on text alone"
        )
    runs = _runs(prompt == model.config.image_token_id)
    if len(runs) != len(pictures):
        raise InvalidTokens(
            f"the prompt has {len(runs)} runs of token {model.config.image_token_id}, and content has {len(pictures)} "
            "pictures: give one for each run"
        )
    tokens, spans = prompt.copy(), []
    for (start, end), inputs in zip(runs, pictures, strict=True):
        digest = _digest(inputs)
        features = known.get(digest)
        if features is None:
            features = known[digest] = Features(digest, inputs)
        tokens[start:end] = content_tokens(digest, end - start)
        spans.append(Span(start, end - start, features))
    return tokens, tuple(spans)


def embeddings(model: PreTrainedModel, step: Step, requests: Sequence[Request]) -> torch.Tensor | None:
    """`[rows, hidden]` for the rows of an open step, or None where none of them is of a picture.

    `requests` are those of the step's leases, in order. A picture whose rows are all cached is not looked at.
    """
    if not any(request.spans for request in requests):
        return None
    parts, first = [], 0
    for request, last in zip(requests, step.last_rows.tolist(), strict=True):
        begin = int(step.positions[first])
        end = begin + last + 1 - first
        for span in request.spans:
            low, high = max(span.start, begin), min(span.start + span.length, end)
            if low < high:
                parts.append(span.features.rows(model, span.length)[low - span.start : high - span.start])
        first = last + 1
    if not parts:
        return None
    where = step.content_rows
    embedded: torch.Tensor = model.get_input_embeddings()(step.input_ids.index_fill(0, where, 0))
    return embedded.index_copy(0, where, torch.cat(parts).to(embedded))


def _runs(marked: np.ndarray) -> list[tuple[int, int]]:
    """Begin and end of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], marked.astype(np.int8), [0]])))
    return [(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]


def _digest(inputs: Any) -> bytes:
    """Of all that the vision tower is given."""
    if not isinstance(inputs, Mapping) or not all(isinstance(x, torch.Tensor) for x in inputs.values()):
        raise InvalidArgument(
            "content is a list with a mapping for each picture, of what the processor made of it: "
            f"[{{'pixel_values': tensor}}]; got {type(inputs).__name__}"
        )
    digest = hashlib.sha256()
    for name in sorted(inputs):
        value = inputs[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()
