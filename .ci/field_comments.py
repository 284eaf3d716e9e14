"""An extension of griffe: what a comment `#:` behind a field says is the field's docstring in the API reference."""

from __future__ import annotations

from typing import Any

from griffe import Attribute, Docstring, Extension


class FieldComments(Extension):
    def on_attribute_instance(self, *, attr: Attribute, **_: Any) -> None:
        if attr.docstring is not None or attr.lineno is None or not attr.lines_collection:
            return
        line = attr.lines_collection[attr.filepath][attr.lineno - 1]
        said = line.partition("#: ")[2].strip()
        if said:
            attr.docstring = Docstring(said, lineno=attr.lineno, endlineno=attr.lineno, parent=attr)
