"""Runs what was exported in onnxruntime, beside the rewritten model in PyTorch, on random inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as state
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_compiler import torch_private as private
from attn_compiler.errors import ExportError
from attn_compiler.export.prepared import Inputs
from attn_compiler.export.report import Checked
from attn_compiler.runtime.exported import attend_eagerly, attend_with_cache
from attn_compiler.testing.budget import error_of, largest, over_budget

FAILURES = (state.Fail, state.InvalidArgument, state.InvalidGraph, state.NotImplemented, state.RuntimeException)


def check(path: Path, module: fx.GraphModule, runs: Sequence[Inputs]) -> tuple[Checked, ...]:
    """Check the file with onnx's own checker, and compare what it computes with the rewritten program."""
    onnx.checker.check_model(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return tuple(_compared(session, inputs, module) for inputs in runs)
    except FAILURES as failure:
        raise ExportError(f"onnxruntime {onnxruntime.__version__} cannot run what the model became: {failure}") from failure


def _compared(session: onnxruntime.InferenceSession, inputs: Inputs, module: fx.GraphModule) -> Checked:
    wanted = [one.name for one in session.get_inputs()]
    actual = [torch.from_numpy(x) for x in session.run(None, {name: inputs[name].detach().numpy() for name in wanted})]
    exact = _run(_Double(module), inputs)
    plain = _run(_Plain(module), inputs)
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in inputs.items() if isinstance(x, Tensor))
    names = [one.name for one in session.get_outputs()]
    wrong = over_budget(actual, exact, lambda: _run(_Plain(module), inputs), names)
    if wrong:
        raise ExportError(f"onnxruntime computes something else than the rewritten model, for {shapes}: {'; '.join(wrong)}")
    return Checked(shapes, max(map(error_of, actual, plain), default=0.0), max(map(largest, plain), default=0.0))


def _run(interpreter: fx.Interpreter, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        found = interpreter.run(*inputs.values())
    return [x for x in private.tree_leaves(found) if isinstance(x, Tensor)]


class _Plain(fx.Interpreter):
    """The program in its own precision, operator by operator: in attentions, too."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.attn_compiler.exported.default:
            return attend_eagerly(*args)
        if target is torch.ops.attn_compiler.exported_with_cache.default:
            return attend_with_cache(*args)
        return fx.Interpreter.call_function(self, target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Guards on the inputs: they hold for those that the model was traced with."""
        return None


class _Double(_Plain):
    """The same, every real number in double precision."""

    def run_node(self, n: fx.Node) -> Any:
        return private.tree_map(_doubled, _Plain.run_node(self, n))

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        return private.tree_map(_doubled, _Plain.fetch_args_kwargs_from_env(self, n))


def _doubled(x: Any) -> Any:
    if isinstance(x, torch.dtype):
        return torch.float64 if x.is_floating_point else x
    return x.double() if isinstance(x, Tensor) and x.dtype.is_floating_point else x
