"""Lowers rewritten programs with torch-mlir: a function for each in one module, which holds every weight once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from attn_compiler import torch_private as private
from attn_compiler.errors import ExportError
from attn_compiler.export.program import decomposing
from attn_compiler.graph.names import module_path

_TO_TORCH = "func.func(torch-match-quantized-custom-ops),torchdynamo-export-to-torch-backend-pipeline{extra-library=}"
_TO_LINALG = "torch-backend-to-linalg-on-tensors-backend-pipeline{allow-non-finites=true}"
PIPELINES: Mapping[str, tuple[str, ...]] = {"linalg": (_TO_TORCH, _TO_LINALG), "torch": (_TO_TORCH,)}
REMAINING: Mapping[str, tuple[str, ...]] = {"linalg": (), "torch": (_TO_LINALG,)}  # from what a dialect's file holds to linalg

# The importer of torch-mlir raises all of these about operators and values that it has never heard of.
_IMPORTER_FAILURES = (AssertionError, KeyError, RuntimeError, TypeError, ValueError)


def lowered(programs: Mapping[str, ExportedProgram], dialect: str) -> Any:
    """A module with a function of each name; results of programs are those of their functions."""
    from torch_mlir.extras.fx_importer import FxImporter

    importer = FxImporter(context=context())
    for name, program in programs.items():
        ready = _ready(program)
        try:
            importer.import_frozen_program(ready, func_name=name)
        except _IMPORTER_FAILURES as failure:
            raise ExportError(f"torch-mlir cannot read the model: {type(failure).__name__}: {failure}") from failure
    for pipeline in PIPELINES[dialect]:
        run_passes(importer.module, pipeline)
    return importer.module


def context() -> Any:
    """A place for modules, which knows the dialects of torch-mlir."""
    from torch_mlir.dialects import torch as dialect
    from torch_mlir.ir import Context

    made = Context()
    dialect.register_dialect(made)
    return made


def run_passes(module: Any, pipeline: str) -> None:
    """Run passes over a module in place."""
    from torch_mlir.ir import MLIRError
    from torch_mlir.passmanager import PassManager

    with module.context:
        try:
            PassManager.parse(f"builtin.module({pipeline})").run(module.operation)
        except MLIRError as failure:
            raise ExportError(f"torch-mlir cannot lower the model: {_complaint(failure)}") from failure
        own = _own_operators(module)
        if own:
            raise ExportError(f"torch-mlir lowers the model to operators that only it can read: {', '.join(own)}")


def _own_operators(module: Any) -> list[str]:
    """What is left of torch-mlir's dialect of sorting and scattering, which files cannot hold."""
    from torch_mlir.ir import WalkResult

    names: set[str] = set()

    def look(operation: Any) -> Any:
        names.add(str(operation.name))
        return WalkResult.ADVANCE

    module.operation.walk(look)
    return sorted(name for name in names if name.startswith("tm_tensor.") and not name.endswith(".yield"))


def _complaint(failure: Any) -> str:
    """The operator that it stops at, and where that stands in the model."""
    if not failure.error_diagnostics:
        return str(failure)
    first = failure.error_diagnostics[0]
    place = re.search(r'"([^"]+)"', str(first.location))
    brief = str(first.message).split(": %", 1)[0].split("\n", 1)[0]
    return f"{place[1]}: {brief}" if place else brief


def _ready(program: ExportedProgram) -> ExportedProgram:
    """The program in operators that torch-mlir knows, whose nodes say where they stand."""
    from torch_mlir.extras.fx_decomp_util import get_decomposition_table

    own = private.decomposed(torch.ops.aten.gelu.default)  # torch-mlir's constants for it have five digits
    with decomposing():
        ready: ExportedProgram = program.run_decompositions({**get_decomposition_table(), **own})
    _check_pure(ready)
    specs = ready.graph_signature.input_specs
    held = {str(spec.target): ready.constants[str(spec.target)] for spec in specs if spec.target in ready.constants}
    ready.state_dict.update({name: x for name, x in held.items() if isinstance(x, Tensor)})  # where it looks for buffers
    for node in ready.graph.nodes:
        if node.op == "call_function":
            node.meta["stack_trace"] = f'File "{module_path(node) or "the model"}, {node.target}", line 0, in forward'
    for node in ready.graph.find_nodes(op="placeholder"):
        if not node.users and not isinstance(node.meta.get("val"), Tensor):
            ready.graph.erase_node(node)  # what a trace has burned in: flags, None
    return ready


def _check_pure(program: ExportedProgram) -> None:
    """Raise where a call of the model is remembered: in MLIR it would silently not be."""
    signature = program.graph_signature
    written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if written:
        raise ExportError(f'the model writes to "{written[0]}", and a function of MLIR remembers nothing: hand it in and out')


def results(module: fx.GraphModule) -> list[Tensor]:
    """What a program is known to give: tensors without contents."""
    (output,) = module.graph.find_nodes(op="output")
    found: list[Any] = []
    fx.map_arg(output.args[0], lambda node: found.append(node.meta["val"]))
    return found
