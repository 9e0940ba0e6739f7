"""Compiles MLIR with IREE for this machine's processor, and runs what that makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attn_compiler.errors import ExportError

INSTALL = "pip install iree-base-compiler iree-base-runtime"
_INPUT_TYPES = {"linalg": "auto", "torch": "torch"}


def is_there() -> bool:
    """Whether IREE is installed: its compiler and its runtime."""
    return find_spec("iree") is not None and all(find_spec(f"iree.{part}") for part in ("compiler", "runtime"))


def compile_vmfb(path: Path, into: Path, dialect: str) -> None:
    """Write what IREE makes of a file of MLIR."""
    from iree.compiler import tools

    try:
        tools.compile_file(
            str(path),
            output_file=str(into),
            input_type=_INPUT_TYPES[dialect],
            target_backends=["llvm-cpu"],
            extra_args=["--iree-llvmcpu-target-cpu=host"],
        )
    except tools.CompilerToolError as failure:
        raise ExportError(f"IREE cannot compile the model: {_complaint(str(failure))}") from failure


class Compiled:
    """A .vmfb, ready to be called."""

    def __init__(self, path: Path) -> None:
        from iree import runtime

        self._module = runtime.load_vm_flatbuffer_file(str(path), driver="local-sync")

    def run(self, name: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Call a function."""
        found = self._module[name](*(x.detach().contiguous().numpy() for x in inputs))
        arrays = found if isinstance(found, list | tuple) else [found]
        return [torch.from_numpy(np.array(x.to_host())) for x in arrays]


def _complaint(text: str) -> str:
    """The first error among what the compiler says."""
    return next((line for line in text.splitlines() if "error:" in line), text.strip().splitlines()[0])
