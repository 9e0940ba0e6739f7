"""Writes an ONNX model whole, or not at all: what fails its check never gets the name that was asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import onnx_ir as ir

LARGEST = 1 << 30  # bytes of weights within one file: protobuf ends at two of these
Result = TypeVar("Result")
_NOTHING: Mapping[str, str] = {}


def write(
    model: ir.Model, path: Path, check: Callable[[Path], Result], beside: Mapping[str, str] = _NOTHING
) -> tuple[Result, int]:
    """Write the model beside `path`, check it there, and move it to its place; the result, and how many bytes it is.

    Large weights stand in a file of their own, `<name>.data`, that must stay beside the model; `beside` are texts that stand
    there, too, by their names.
    """
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".part") as folder:
        unfinished = Path(folder) / path.name
        ir.save(model, unfinished, external_data=f"{path.name}.data" if weights > LARGEST else None)
        for name, text in beside.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        result = check(unfinished)
        parts = sorted(Path(folder).iterdir(), key=lambda part: part.name == path.name)  # the model last
        size = sum(part.stat().st_size for part in parts)
        outside = path.with_name(f"{path.name}.data")
        if path.exists() and not (Path(folder) / outside.name).exists():
            outside.unlink(missing_ok=True)  # of the file that is written over
        for part in parts:
            part.replace(path.parent / part.name)
    return result, size
