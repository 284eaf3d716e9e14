"""Pictures in prompts: each gets ids by what it shows, and the model gets its features where those ids stand.

For families whose text part sees a picture as so many causal rows: with its features at the bottom, or added between
the first layers, too (Qwen3-VL), at positions of their own or by time, height and width (Qwen2-VL and later).
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch

from radixkv.content import content_tokens
from radixkv.errors import InvalidArgument, InvalidTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from radixkv.hf.request import Request
    from radixkv.step import Step

__all__ = ["FAMILIES", "Content", "Features", "Inputs", "Placed", "Span", "adding", "inputs_of", "place_pictures"]

FAMILIES = frozenset(
    [
        *("aya_vision", "cohere2_vision", "idefics3", "internvl", "llava", "qianfan_ocr", "smolvlm"),
        *("cohere_compass", "cosmos3_edge", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "paddleocr_vl"),
        *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"),
    ]
)
"""Model types whose answers with pictures are equal to those of stock `generate`: the tests try each."""

Content = Mapping[str, Any] | Sequence[Mapping[str, torch.Tensor]]
"""What the model's processor made of a prompt; or for each run of placeholders what the vision part takes for it."""

_NOT_CAUSAL = frozenset({"gemma3", "paligemma"})


class Features:
    """What the model makes of one picture. Computed when a row of it is first needed, and then kept."""

    def __init__(self, digest: bytes, inputs: Mapping[str, torch.Tensor]) -> None:
        self.digest = digest
        self._inputs = inputs
        self._layers: list[torch.Tensor] = []

    def layers(self, model: PreTrainedModel, count: int) -> list[torch.Tensor]:
        """`[count, hidden]`, for the `count` tokens that stand for the picture.

        The first is in place of their embeddings, the others are added to what the first layers give.
        """
        if not self._layers:
            inputs = {name: x.to(model.device) for name, x in self._inputs.items()}
            found = model.get_image_features(**inputs, return_dict=True)
            given = [found.pooler_output, *(getattr(found, "deepstack_features", None) or ())]
            self._layers = [x.flatten(0, -2) if isinstance(x, torch.Tensor) else torch.cat(list(x)) for x in given]
        if len(self._layers[0]) != count:
            raise InvalidTokens(
                f"the prompt has {count} placeholders for a picture of which the model makes {len(self._layers[0])} "
                "rows: use the input_ids of the model's own processor"
            )
        return self._layers


class Span(NamedTuple):
    """Where a picture stands in a prompt: positions `start` to `start + length`."""

    start: int
    length: int
    features: Features


class Placed(NamedTuple):
    """A prompt with each picture's own ids in place of its placeholders, and where each picture stands."""

    tokens: np.ndarray
    spans: tuple[Span, ...] = ()
    positions: torch.Tensor | None = None
    """int64 `[3, tokens]`, of models that place tokens by time, height and width."""


def place_pictures(
    model: PreTrainedModel,
    prompt: np.ndarray,
    content: Content,
    known: MutableMapping[bytes, Features],
) -> Placed:
    """Place pictures where the runs of placeholders are.

    `known` has the features that other requests are about to compute, by digest.
    """
    _check_family(model)
    runs = _runs(prompt == model.config.image_token_id)
    pictures = _divided(model, content, runs) if isinstance(content, Mapping) else content
    if len(runs) != len(pictures):
        raise InvalidTokens(
            f"the prompt has {len(runs)} runs of token {model.config.image_token_id}, and content has {len(pictures)} "
            "pictures: give one for each run"
        )
    if not pictures:
        return Placed(prompt)
    tokens, spans = prompt.copy(), []
    for (start, end), inputs in zip(runs, pictures, strict=True):
        digest = _digest(inputs)
        features = known.get(digest)
        if features is None:
            features = known[digest] = Features(digest, inputs)
        tokens[start:end] = content_tokens(digest, end - start)
        spans.append(Span(start, end - start, features))
    return Placed(tokens, tuple(spans), _positions(model, prompt, pictures))


def _divided(
    model: PreTrainedModel, inputs: Mapping[str, Any], runs: Sequence[tuple[int, int]]
) -> list[dict[str, torch.Tensor]]:
    """What a processor made of one prompt, as a mapping for each run of placeholders.

    Whatever a processor makes of pictures (themselves, their tiles, their patches), they lie one after the other, and
    each stands for as many placeholders as the next: so a run has the share of them that it has of all placeholders.
    """
    ids = inputs.get("input_ids")
    if isinstance(ids, torch.Tensor) and ids.ndim == 2 and len(ids) != 1:
        raise InvalidArgument(f"content is what the processor made of {len(ids)} prompts: call the processor for each")
    takes = inspect.signature(model.get_image_features).parameters
    given = {name: value for name, value in inputs.items() if name in takes}
    _check_tensors(given)
    if "pixel_values" not in given or not runs:
        return [given] if given else []
    dim = 1 if given["pixel_values"].ndim == 5 else 0  # Idefics 3 has one for prompts before that of tiles
    ends = _shares(given["pixel_values"].shape[dim], [end - start for start, end in runs])
    grids = given.pop("image_grid_thw", None)
    divided = [
        {name: x.narrow(dim, start, end - start) for name, x in given.items()}
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    if grids is not None:
        for parts, sizes in zip(divided, _divided_grids(grids.view(-1, 3), ends), strict=True):
            parts["image_grid_thw"] = sizes
    return divided


def _divided_grids(grids: torch.Tensor, ends: Sequence[int]) -> list[torch.Tensor]:
    """The sizes `[pictures, 3]` of those that are within each of the shares of patches which end there."""
    patches = grids.prod(1).cumsum(0).tolist()
    if not {*ends} <= {*patches}:
        raise InvalidTokens(
            f"the runs of placeholders end after {list(ends)} patches, pictures of image_grid_thw {grids.tolist()} "
            f"after {patches}: use the input_ids of the model's own processor"
        )
    cuts = [patches.index(end) + 1 for end in ends]
    return [grids[start:end] for start, end in zip([0, *cuts], cuts, strict=False)]


def _shares(count: int, lengths: Sequence[int]) -> list[int]:
    """Where the shares of runs of these lengths end, of `count` items."""
    ends = np.cumsum(lengths) * count
    if np.any(ends % sum(lengths)):
        raise InvalidTokens(
            f"pixel_values has {count} pictures, tiles or patches, which runs of {list(lengths)} placeholders do not "
            "divide evenly: use the input_ids of the model's own processor, or give a mapping for each run"
        )
    return [int(end) for end in ends // sum(lengths)]


def _check_family(model: PreTrainedModel) -> None:
    name, kind = type(model).__name__, model.config.model_type
    if kind in _NOT_CAUSAL:
        raise InvalidArgument(
            f"{name} cannot be given content: the rows of a picture see the rows after them, so what is cached of a "
            "prompt would depend on where it is cut; it runs on text alone"
        )
    if kind not in FAMILIES:
        raise InvalidArgument(
            f"{name} cannot be given content: pictures are placed for {', '.join(sorted(FAMILIES))}; other families "
            "run on text alone"
        )


def _positions(
    model: PreTrainedModel, prompt: np.ndarray, pictures: Sequence[Mapping[str, torch.Tensor]]
) -> torch.Tensor | None:
    """Where the model itself places the tokens by time, height and width. None: it counts them.

    They follow from the tokens and the sizes of the pictures before, and so from what a cached prefix is found by.
    """
    index = getattr(model.base_model, "get_rope_index", None)
    if index is None:
        return None
    if any("image_grid_thw" not in inputs for inputs in pictures):
        raise InvalidArgument(
            f"{type(model).__name__} places a picture by its size: give 'image_grid_thw' beside 'pixel_values' in "
            "each mapping of content, as the processor does"
        )
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    grids = torch.cat([inputs["image_grid_thw"].view(-1, 3) for inputs in pictures])
    try:
        marks = (ids == model.config.image_token_id).int()
        found, _ = index(input_ids=ids, mm_token_type_ids=marks, image_grid_thw=grids.cpu())
    except (RuntimeError, IndexError) as error:
        raise InvalidTokens(
            f"the placeholders of the prompt do not fit pictures of image_grid_thw {grids.tolist()}: use the input_ids "
            f"of the model's own processor ({error})"
        ) from error
    return cast("torch.Tensor", found[:, 0])


class Inputs(NamedTuple):
    """What a step's rows are given beside its tokens; None: nothing but these."""

    embeds: torch.Tensor | None = None
    """`[rows, hidden]`, in place of the tokens."""
    positions: torch.Tensor | None = None
    """int64 `[3, rows]`, in place of the step's."""
    added: tuple[torch.Tensor, ...] = ()
    """For each of the first layers what is added after it, `[rows of pictures, hidden]`."""


def inputs_of(model: PreTrainedModel, step: Step, requests: Sequence[Request]) -> Inputs:
    """Of an open step. `requests` are those of its leases, in order.

    A picture whose rows are all cached is not looked at.
    """
    if not any(request.spans for request in requests):
        return Inputs()
    features, positions, first = [], [], 0
    for request, last in zip(requests, step.last_rows.tolist(), strict=True):
        begin = int(step.positions[first])
        end = begin + last + 1 - first
        for span in request.spans:
            low, high = max(span.start, begin), min(span.start + span.length, end)
            if low < high:
                layers = span.features.layers(model, span.length)
                features.append([rows[low - span.start : high - span.start] for rows in layers])
        positions.append(_between(request.positions, begin, end))
        first = last + 1
    placed = torch.cat(positions, 1) if any(request.positions is not None for request in requests) else None
    placed = None if placed is None else placed.to(step.positions.device)
    if not features:
        return Inputs(positions=placed)
    where = step.content_rows
    embedded: torch.Tensor = model.get_input_embeddings()(step.input_ids.index_fill(0, where, 0))
    bottom, *added = (torch.cat(rows) for rows in zip(*features, strict=True))
    return Inputs(embedded.index_copy(0, where, bottom.to(embedded)), placed, tuple(added))


def _between(positions: torch.Tensor | None, begin: int, end: int) -> torch.Tensor:
    """`[3, end - begin]`: where these tokens of a sequence stand, whose prompt has these positions."""
    counted = torch.arange(begin, end).expand(3, -1)
    if positions is None:
        return counted
    prompt = positions.shape[1]
    after = counted[:, max(prompt - begin, 0) :] + int(positions.max()) + 1 - prompt
    return torch.cat([positions[:, begin:end], after], 1)


@contextmanager
def adding(model: PreTrainedModel, step: Step, added: Sequence[torch.Tensor]) -> Iterator[None]:
    """Have the first layers of the text part add these rows inside the block, where the step's are of pictures."""
    if not added:
        yield
        return
    where = torch.zeros((1, len(step.input_ids)), dtype=torch.bool, device=step.input_ids.device)
    where[0, step.content_rows] = True
    more = {"visual_pos_masks": where, "deepstack_visual_embeds": list(added)}
    text: Any = model.get_decoder()
    hook = text.register_forward_pre_hook(lambda module, args, given: (args, given | more), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _runs(marked: np.ndarray) -> list[tuple[int, int]]:
    """Begin and end of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], marked.astype(np.int8), [0]])))
    return [(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]


def _check_tensors(inputs: Any) -> None:
    if not isinstance(inputs, Mapping):
        raise InvalidArgument(
            "content is what the model's processor made of the prompt, or a list with a mapping for each run of "
            f"placeholders, [{{'pixel_values': tensor}}]; got a list with {type(inputs).__name__}"
        )
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            raise InvalidArgument(
                f"{name!r} in content is a {type(value).__name__}: call the processor with return_tensors='pt'"
            )


def _digest(inputs: Any) -> bytes:
    """Of all that the vision tower is given."""
    _check_tensors(inputs)
    digest = hashlib.sha256()
    for name in sorted(inputs):
        value = inputs[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()
