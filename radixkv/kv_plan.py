"""KvPlan: formats of a model's layers that were measured to be good enough, in a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from radixkv.errors import InvalidArgument
from radixkv.formats import LayerFormat, RowFormat
from radixkv.shape import LayerShape

__all__ = ["KvPlan"]

_VERSION = 1


@dataclass(frozen=True)
class KvPlan:
    """The format of each layer of a model, as `radixkv kv-check` found it. `Engine(kv_format=plan)` takes it.

    It fits models with the same layers and no others. Where a format is None, K and V stay in the model's own dtype.
    """

    shapes: tuple[LayerShape, ...]
    formats: tuple[LayerFormat | None, ...]
    measured: dict[str, Any]
    """On what text, and what came out."""

    def formats_for(self, shapes: Sequence[LayerShape]) -> list[LayerFormat | None]:
        """The formats for a model of these layers.

        Raises:
            InvalidArgument: the plan is for other layers; names the first difference.
        """
        if len(shapes) != len(self.shapes):
            raise InvalidArgument(f"the plan is for {len(self.shapes)} layers, the model has {len(shapes)}: check it")
        for i, (mine, its) in enumerate(zip(self.shapes, shapes, strict=True)):
            if mine != its:
                raise InvalidArgument(f"the plan is for another model: its layer {i} is {mine}, the model's {its}")
        return list(self.formats)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file appears whole or not at all."""
        text = json.dumps(
            {
                "radixkv_kv_plan": _VERSION,
                "measured": self.measured,
                "layers": [
                    asdict(shape) | {"format": None if stored is None else _written(stored)}
                    for shape, stored in zip(self.shapes, self.formats, strict=True)
                ],
            },
            indent=1,
        )
        partial = Path(f"{os.fspath(path)}.part")
        partial.write_text(text + "\n")
        partial.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> KvPlan:
        """Read a plan.

        Raises:
            InvalidArgument: it is none, or of a later version; OSError: it cannot be read.
        """
        try:
            found = json.loads(Path(path).read_text())
            version = found["radixkv_kv_plan"]
            if version != _VERSION:
                raise InvalidArgument(f"{path} is a plan of version {version}: this release reads {_VERSION}")
            layers = [dict(layer) for layer in found["layers"]]
            formats = [_format(layer.pop("format")) for layer in layers]
            return cls(tuple(LayerShape(**layer) for layer in layers), tuple(formats), dict(found["measured"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InvalidArgument):
                raise
            raise InvalidArgument(f"{path} is no plan of radixkv kv-check: {type(error).__name__}: {error}") from error


def _written(stored: LayerFormat) -> dict[str, Any]:
    return asdict(stored) | {"usual_scales": [s if math.isfinite(s) else None for s in stored.usual_scales]}


def _format(found: dict[str, Any] | None) -> LayerFormat | None:
    if found is None:
        return None
    k_usual, v_usual = (math.inf if s is None else float(s) for s in found["usual_scales"])
    centre = tuple(map(float, found["k_centre"]))
    return LayerFormat(RowFormat(**found["k"]), RowFormat(**found["v"]), centre, (k_usual, v_usual))
