"""Reads what a model keeps of a token from the head of a GGUF file: its key-value pairs, and nothing behind them."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any, BinaryIO

from radixkv.capacity.sizes import Layer, Model, checked_layers
from radixkv.errors import InvalidArgument

__all__ = ["model_from_gguf"]

_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_STRING, _MAX_ARRAY, _MAX_PAIRS = 2**24, 2**24, 2**16
_KEPT = 4096
"""Longer arrays are vocabularies: they are passed over."""


def model_from_gguf(path: Path) -> Model:
    """The model of a GGUF file; its weights are as large as the file, and its other parts if it has some."""
    try:
        with path.open("rb") as stream:
            fields = _fields(stream)
    except (struct.error, UnicodeDecodeError, OverflowError) as error:
        raise InvalidArgument(f"{path} is no GGUF file that can be read, or is cut off: {error}") from None
    arch = str(fields.get("general.architecture"))
    own = {key.removeprefix(f"{arch}."): value for key, value in fields.items()}
    try:
        layers = [_layer(own, i) for i in range(checked_layers(_at(own["block_count"], 0), str(path)))]
    except InvalidArgument:
        raise
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InvalidArgument(f"{path}: the head of architecture {arch!r} has no usable {error}") from None
    attention = [layer for layer in layers if layer is not None]
    shared = int(own.get("attention.shared_kv_layers") or 0)
    return Model(
        name=str(fields.get("general.name") or path.name),
        layers=tuple(attention[: len(attention) - shared]),
        weight_bytes=sum(part.stat().st_size for part in _parts(path)),
        max_length=own.get("context_length"),
        num_state_layers=len(layers) - len(attention),
        num_sharing_layers=shared,
    )


def _layer(own: dict[str, Any], i: int) -> Layer | None:
    """Layer i, or None for one that keeps a state."""
    heads = _at(own["attention.head_count"], i)
    kv_heads = _at(own.get("attention.head_count_kv", heads), i)
    if kv_heads == 0:
        return None
    window = own.get("attention.sliding_window") or None
    if window is not None and not _slides(own, i):
        window = None
    rank = own.get("attention.kv_lora_rank")
    if rank:
        return Layer(heads, 1, rank + own["rope.dimension_count"], 0, window)
    default = own["embedding_length"] // _at(own["attention.head_count"], i)
    k, v = own.get("attention.key_length", default), own.get("attention.value_length", default)
    if window is not None:
        k, v = own.get("attention.key_length_swa", k), own.get("attention.value_length_swa", v)
    return Layer(heads, kv_heads, k, v, window)


def _slides(own: dict[str, Any], i: int) -> bool:
    """Whether layer i sees its window only. Where the file does not say, its family does."""
    by_family = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2, "cohere2": 4}
    pattern = own.get("attention.sliding_window_pattern", by_family.get(own.get("general.architecture", ""), 1))
    if isinstance(pattern, list):
        return bool(pattern[i])
    return bool(pattern <= 1 or (i + 1) % pattern)


def _at(value: Any, i: int) -> int:
    return int(value[i] if isinstance(value, list) else value)


def _parts(path: Path) -> list[Path]:
    """The files of a model that was split: name-00001-of-00003.gguf."""
    match = re.fullmatch(r"(.*-)\d{5}(-of-\d{5}\.gguf)", path.name)
    return [path] if match is None else sorted(path.parent.glob(f"{match[1]}?????{match[2]}"))


def _fields(stream: BinaryIO) -> dict[str, Any]:
    if stream.read(4) != b"GGUF":
        raise struct.error("it does not begin with GGUF")
    version, _, count = _unpack(stream, "<IQQ")
    if version not in (2, 3) or count > _MAX_PAIRS:
        raise struct.error(f"version {version} with {count} fields: known are versions 2 and 3, little endian")
    found = {}
    for _ in range(count):
        key = _string(stream)
        found[key] = _value(stream, *_unpack(stream, "<I"))
    return found


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind in _FIXED:
        return _unpack(stream, "<" + _FIXED[kind])[0]
    if kind == _STRING:
        return _string(stream)
    if kind != _ARRAY:
        raise struct.error(f"a value of type {kind}")
    of, count = _unpack(stream, "<IQ")
    if count > _MAX_ARRAY or (of not in _FIXED and of != _STRING):
        raise struct.error(f"an array of {count} values of type {of}")
    if of in _FIXED:
        values = _unpack(stream, f"<{count}{_FIXED[of]}")
        return list(values) if count <= _KEPT else None
    for _ in range(count):
        _string(stream)
    return None


def _string(stream: BinaryIO) -> str:
    (length,) = _unpack(stream, "<Q")
    if length > _MAX_STRING:
        raise struct.error(f"a text of {length} bytes")
    return _exactly(stream, length).decode()


def _unpack(stream: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(layout, _exactly(stream, struct.calcsize(layout)))


def _exactly(stream: BinaryIO, count: int) -> bytes:
    found = stream.read(count)
    if len(found) < count:
        raise struct.error("it ends too early")
    return found
