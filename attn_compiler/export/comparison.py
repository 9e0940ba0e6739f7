"""Compares what an exported file computes with the rewritten model in PyTorch, on random inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_compiler import torch_private as private
from attn_compiler.errors import ExportError
from attn_compiler.export.prepared import Inputs
from attn_compiler.export.report import Checked
from attn_compiler.runtime.exported import attend_eagerly, attend_with_cache, attend_with_state
from attn_compiler.testing.budget import error_of, largest, over_budget

Run = Callable[[Inputs], Sequence[Tensor]]


def compared(by: str, run: Run, inputs: Inputs, module: fx.GraphModule, names: Sequence[str] = ()) -> Checked:
    """Raise where what `run` finds is further from the exact results than their budget; `by` names who runs the file."""
    exact, plain = _run(_Double(module), inputs), _run(Plain(module), inputs)
    actual = run(inputs)
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in inputs.items() if isinstance(x, Tensor))
    names = names or [f"result {place}" for place in range(len(exact))]
    wrong = over_budget(actual, exact, lambda: _run(Plain(module), inputs), names)
    if wrong:
        raise ExportError(f"{by} computes something else than the rewritten model, for {shapes}: {'; '.join(wrong)}")
    return Checked(by, shapes, max(map(error_of, actual, plain), default=0.0), max(map(largest, plain), default=0.0))


def _run(interpreter: fx.Interpreter, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        found = interpreter.run(*inputs.values())
    return [x for x in private.tree_leaves(found) if isinstance(x, Tensor)]


class Plain(fx.Interpreter):
    """The program in its own precision, operator by operator: in attentions, too."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.attn_compiler.exported.default:
            return attend_eagerly(*args)
        if target is torch.ops.attn_compiler.exported_with_cache.default:
            return attend_with_cache(*args)
        if target is torch.ops.attn_compiler.exported_with_state.default:
            return attend_with_state(*args)
        return fx.Interpreter.call_function(self, target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Guards on the inputs: they hold for those that the model was traced with."""
        return None


class _Double(Plain):
    """The same, every real number in double precision."""

    def run_node(self, n: fx.Node) -> Any:
        return private.tree_map(_doubled, Plain.run_node(self, n))

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        return private.tree_map(_doubled, Plain.fetch_args_kwargs_from_env(self, n))


def _doubled(x: Any) -> Any:
    if isinstance(x, torch.dtype):
        return torch.float64 if x.is_floating_point else x
    return x.double() if isinstance(x, Tensor) and x.dtype.is_floating_point else x
