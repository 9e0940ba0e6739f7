"""Writes the rows of a benchmark as JSON for programs and as Markdown for people."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

Row = Mapping[str, object]


def markdown(rows: Sequence[Row]) -> str:
    """A table whose columns are the keys of the first row."""
    if not rows:
        return "none\n"
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row[column]) for column in columns] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
    }


def processor() -> str:
    """The name that the processor gives itself."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def features() -> str:
    """What the processor can do that matters to kernels."""
    path = Path("/proc/cpuinfo")
    flags = set(path.read_text().split()) if path.exists() else set()
    return ", ".join(name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags) or "unknown"


def write_json(path: Path, document: Mapping[str, object]) -> None:
    path.write_text(json.dumps({"machine": machine(), **document}, indent=2) + "\n")
