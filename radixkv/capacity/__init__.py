"""How large a KV cache is: bytes a token, a page and a request, and what fits. `radixkv plan` prints it.

    model = read_model("llama-3-8b")                       # or a config.json, a folder, a GGUF file
    bytes_per_token(model, FORMATS["bf16"])                # 131072
    fit(model, FORMATS["bf16"], 80 * 2**30, 16 * 2**30).requests_of(2048)      # 230

Nothing here loads a model or needs torch.
"""

from radixkv.capacity.config import model_from_config
from radixkv.capacity.fit import Fit, Need, fit, need_for, paging_waste, preallocation_waste
from radixkv.capacity.read import known_models, read_model
from radixkv.capacity.sizes import (
    Layer,
    Model,
    bytes_per_page,
    bytes_per_request,
    bytes_per_token,
    expanded,
    fits_latent,
)
from radixkv.formats import FORMATS
from radixkv.memory import format_bytes

__all__ = [
    "FORMATS",
    "Fit",
    "Layer",
    "Model",
    "Need",
    "bytes_per_page",
    "bytes_per_request",
    "bytes_per_token",
    "expanded",
    "fit",
    "fits_latent",
    "format_bytes",
    "known_models",
    "model_from_config",
    "need_for",
    "paging_waste",
    "preallocation_waste",
    "read_model",
]
