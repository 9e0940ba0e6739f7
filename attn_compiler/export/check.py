"""Runs what was exported in onnxruntime, beside the rewritten model in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as state
from torch import Tensor, fx

from attn_compiler.errors import ExportError
from attn_compiler.export.comparison import compared
from attn_compiler.export.prepared import Inputs
from attn_compiler.export.report import Checked

FAILURES = (state.Fail, state.InvalidArgument, state.InvalidGraph, state.NotImplemented, state.RuntimeException)


def check(path: Path, module: fx.GraphModule, runs: Sequence[Inputs]) -> tuple[Checked, ...]:
    """Check the file with onnx's own checker, and compare what it computes with the rewritten program."""
    onnx.checker.check_model(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_outputs()]
        return tuple(compared("onnxruntime", lambda given: _run(session, given), inputs, module, names) for inputs in runs)
    except FAILURES as failure:
        raise ExportError(f"onnxruntime {onnxruntime.__version__} cannot run what the model became: {failure}") from failure


def _run(session: onnxruntime.InferenceSession, inputs: Inputs) -> list[Tensor]:
    wanted = [one.name for one in session.get_inputs()]
    return [torch.from_numpy(x) for x in session.run(None, {name: inputs[name].detach().numpy() for name in wanted})]
