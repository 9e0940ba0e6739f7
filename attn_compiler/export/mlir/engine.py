"""Runs MLIR on this machine with what torch-mlir brings: loops as they are written, to see what a module computes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attn_compiler.errors import ExportError
from attn_compiler.export.mlir.lowering import REMAINING, context, run_passes

# From linalg on tensors to LLVM. `copy-before-write` is what operators of tm_tensor need; without `refback-munge-memref-copy`
# a library would be needed that the wheel does not hold.
_TO_LOOPS = (
    "func.func(refback-generalize-tensor-pad)",
    "func.func(refback-generalize-tensor-concat)",
    "func.func(linalg-generalize-named-ops)",
    "func.func(linalg-fuse-elementwise-ops)",
    "canonicalize",
    "cse",
    "func.func(tm-tensor-bufferize)",
    "one-shot-bufferize{copy-before-write bufferize-function-boundaries allow-return-allocs-from-loops "
    "function-boundary-type-conversion=identity-layout-map}",
    "buffer-results-to-out-params{modify-public-functions=true}",
    "buffer-deallocation-pipeline",
    "canonicalize",
    "func.func(tm-tensor-to-loops)",
    "func.func(refback-munge-memref-copy)",
    "func.func(convert-linalg-to-loops)",
)
_TO_LLVM = (
    "func.func(lower-affine)",
    "convert-scf-to-cf",
    "func.func(arith-expand)",
    "func.func(convert-math-to-llvm)",
    "convert-math-to-libm",
    "expand-strided-metadata",
    "lower-affine",
    "finalize-memref-to-llvm",
    "func.func(convert-arith-to-llvm)",
    "convert-index-to-llvm",
    "convert-func-to-llvm",
    "convert-cf-to-llvm",
    "reconcile-unrealized-casts",
)
_FLOATS = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
_WHOLE = {"i1": torch.bool, "i8": torch.int8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64}
_DTYPES = {**_FLOATS, **_WHOLE}
_SAME_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Engine:
    """A file's functions, ready to be called."""

    def __init__(self, path: Path, dialect: str) -> None:
        from torch_mlir.execution_engine import ExecutionEngine
        from torch_mlir.ir import Module, UnitAttr

        made = context()
        with made:
            module = Module.parseFile(str(path))
        for passes in REMAINING[dialect]:
            run_passes(module, passes)
        self._types = {str(one.name.value): one.type for one in module.body.operations if one.operation.name == "func.func"}
        with made:
            for operation in module.body.operations:
                operation.attributes["llvm.emit_c_interface"] = UnitAttr.get()
        for passes in (",".join(_TO_LOOPS), ",".join(_TO_LLVM)):
            run_passes(module, passes)
        try:
            with made:
                self._engine = ExecutionEngine(module, opt_level=0)  # optimizing takes longer than running once
        except RuntimeError as failure:
            raise ExportError(f"torch-mlir's execution engine cannot run the model: {failure}") from failure

    def run(self, name: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Call a function."""
        wanted = [list(one.shape) for one in self._types[name].inputs]
        given = [list(x.shape) for x in inputs]
        if given != wanted:
            raise ExportError(f"the function {name} takes {wanted}; found {given}")
        results = [torch.empty(one.shape, dtype=_DTYPES[str(one.element_type)]) for one in self._types[name].results]
        arrays = [_array(x) for x in (*inputs, *results)]
        descriptors = [_descriptor(x) for x in arrays]
        self._engine.invoke(name, *(ctypes.pointer(ctypes.pointer(one)) for one in descriptors))
        return results


def _array(x: Tensor) -> Any:
    """The numbers of a tensor where they lie; of which type they are, the module knows."""
    return x.detach().contiguous().view(_SAME_WIDTH[x.element_size()]).numpy()


def _descriptor(array: Any) -> Any:
    from torch_mlir.runtime import get_ranked_memref_descriptor

    return get_ranked_memref_descriptor(array)
