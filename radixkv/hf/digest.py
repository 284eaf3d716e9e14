"""What tells one model from another, for pages that outlive the process."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch
import transformers
from xxhash import xxh3_128_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["weights_digest"]

_NOT_THE_MODEL = ("_name_or_path", "architectures", "transformers_version", "dtype")  # where it lies, what else says


def weights_digest(model: PreTrainedModel) -> str:
    """A digest of all that decides what `model` computes: weights, buffers, configuration, and transformers' version.

    Another revision, adapter, quantization or rope gives another digest; another folder with the same model does not.
    Reads every weight once.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_THE_MODEL}
    digest = hashlib.blake2b(digest_size=16)
    what = [type(model).__name__, transformers.__version__, config]
    digest.update(json.dumps(what, sort_keys=True, default=str).encode())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(_content(tensor))
    return digest.hexdigest()


def _content(tensor: torch.Tensor) -> bytes:
    """A checksum of the tensor's bytes, 128 bits, which is much faster than a keyed hash of them."""
    return xxh3_128_digest(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
