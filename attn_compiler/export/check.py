"""Runs what was exported in onnxruntime, beside the rewritten model in PyTorch, on random inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_compiler import torch_private as private
from attn_compiler.errors import ExportError
from attn_compiler.export.program import Rewritten
from attn_compiler.export.report import Checked
from attn_compiler.export.trials import trials
from attn_compiler.runtime.exported import attend_eagerly
from attn_compiler.testing.budget import error_of, largest, over_budget

TRIALS = 2


def check(path: Path, rewritten: Rewritten, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Checked, ...]:
    """Check the file with onnx's own checker, and compare what it computes with the rewritten program."""
    onnx.checker.check_model(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    leaves, structure = private.tree_flatten((tuple(args), dict(kwargs)))
    program, model = rewritten.program, rewritten.module
    names = [str(name) for name in program.graph_signature.user_inputs]
    accepted = [inputs for inputs in trials(program, leaves) if _takes(model, inputs)]
    return tuple(
        _compared(session, dict(zip(names, inputs, strict=True)), model, private.tree_unflatten(inputs, structure))
        for inputs in accepted[:TRIALS]
    )


def _takes(model: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether inputs are such as the program was traced for: relations among sizes are guards, which stand in front."""
    given = dict(zip(model.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for node in model.graph.find_nodes(op="call_module"):
        try:
            model.get_submodule(str(node.target))(*(given[x] for x in node.all_input_nodes))
        except AssertionError:
            return False
    return True


def _compared(session: onnxruntime.InferenceSession, inputs: Mapping[str, Any], model: fx.GraphModule, call: Any) -> Checked:
    wanted = [one.name for one in session.get_inputs()]
    actual = [torch.from_numpy(x) for x in session.run(None, {name: inputs[name].detach().numpy() for name in wanted})]
    exact = _run(_Double(model), call)
    plain = _run(_Plain(model), call)
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in inputs.items() if isinstance(x, Tensor))
    names = [one.name for one in session.get_outputs()]
    wrong = over_budget(actual, exact, lambda: _run(_Plain(model), call), names)
    if wrong:
        raise ExportError(f"onnxruntime computes something else than the rewritten model, for {shapes}: {'; '.join(wrong)}")
    return Checked(shapes, max(map(error_of, actual, plain), default=0.0), max(map(largest, plain), default=0.0))


def _run(interpreter: fx.Interpreter, call: Any) -> list[Tensor]:
    flat = private.tree_leaves(call)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        found = interpreter.run(*flat)
    return [x for x in private.tree_leaves(found) if isinstance(x, Tensor)]


class _Plain(fx.Interpreter):
    """The program in its own precision, operator by operator: in attentions, too."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.attn_compiler.exported.default:
            return attend_eagerly(*args)
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
