"""Saves an ONNX model with all that belongs to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import onnx_ir as ir

from attn_compiler.export.files import place

LARGEST = 1 << 30  # bytes of weights within one file: protobuf ends at two of these
Result = TypeVar("Result")
_NOTHING: Mapping[str, str] = {}


def write(
    model: ir.Model, path: Path, check: Callable[[Path], Result], beside: Mapping[str, str] = _NOTHING
) -> tuple[Result, int]:
    """Place the model at `path` once it is checked; the result, and how many bytes it is.

    Large weights stand in a file of their own, `<name>.data`, that must stay beside the model; `beside` are texts that stand
    there, too, by their names.
    """
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    outside = f"{path.name}.data"

    def save(unfinished: Path) -> None:
        ir.save(model, unfinished, external_data=outside if weights > LARGEST else None)
        for name, text in beside.items():
            unfinished.with_name(name).write_text(text, encoding="utf-8")

    return place(path, save, check, companion=outside)
