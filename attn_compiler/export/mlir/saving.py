"""Saves a module of MLIR: as text, or as bytecode, where weights take as many bytes as they have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attn_compiler.export.metadata import ATTENTIONS, BYTECODE


def save(module: Any, path: Path, labels: str, report: str) -> None:
    """Write the module; `labels` are read back by `attn explain`, the report is for whoever reads the text."""
    if path.suffix == BYTECODE:
        _labelled(module, labels)
        with path.open("wb") as file:
            module.operation.write_bytecode(file)
    else:
        comment = "\n".join(f"// {line}".rstrip() for line in report.splitlines())
        path.write_text(f"// {ATTENTIONS}: {labels}\n{comment}\n{module}", encoding="utf-8")


def _labelled(module: Any, labels: str) -> None:
    """Let the first function say it, since bytecode has no comments, and a module no attributes but those of dialects."""
    from torch_mlir.ir import StringAttr

    with module.context:
        first = next(one for one in module.body.operations if one.operation.name == "func.func")
        first.attributes["attentions"] = StringAttr.get(f"{ATTENTIONS}: {labels}")
