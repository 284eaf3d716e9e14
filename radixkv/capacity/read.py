"""Finds a model: a name of the committed table, a config.json, a folder, or a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from radixkv.capacity.config import model_from_config
from radixkv.capacity.gguf import model_from_gguf
from radixkv.capacity.sizes import Model
from radixkv.errors import InvalidArgument, ModelNotFound

__all__ = ["known_models", "read_model"]


def known_models() -> dict[str, Model]:
    """The models of the table that comes with the package, by name."""
    table = json.loads((Path(__file__).parent / "models.json").read_text())
    return {name: model_from_config(entry, name, entry["weight_bytes"]) for name, entry in table.items()}


def read_model(source: str) -> Model:
    """The model that ``source`` names: a name of `known_models()`, a config.json, a folder, or a GGUF file.

    Raises ModelNotFound where there is none, InvalidArgument for one that cannot be read. Loads no weights.
    """
    known = known_models()
    if source.lower() in known:
        return known[source.lower()]
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return model_from_gguf(path)
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if files:
            return model_from_gguf(files[0])
        raise ModelNotFound(f"{path} has no config.json and no GGUF file: give another folder")
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        close = get_close_matches(source.lower(), known, n=3, cutoff=0.4)
        meant = f"did you mean {' or '.join(close)}? " if close else ""
        raise ModelNotFound(
            f"{source!r:.200} is neither a file nor a known model: {meant}Known are {', '.join(known)}; "
            "else give a config.json, a folder with one, or a GGUF file"
        )
    return model_from_config(_config(file), file.resolve().parent.name, _weights_in(file.parent))


def _config(file: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{file} is no JSON: {error}") from None
    if not isinstance(config, Mapping):
        raise InvalidArgument(f"{file} is no configuration: it holds a {type(config).__name__}, not an object")
    return config


def _weights_in(folder: Path) -> int | None:
    """Bytes of the weights in a folder; None where it has none."""
    for pattern in ("model*.safetensors", "*.safetensors", "pytorch_model*.bin"):
        found = sum(file.stat().st_size for file in folder.glob(pattern))
        if found:
            return found
    return None
