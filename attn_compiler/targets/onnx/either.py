"""Two bodies in one function: all keys where queries are few, the keys in reach where they are many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import onnx_ir as ir

from attn_compiler.targets.onnx.dense import dense
from attn_compiler.targets.onnx.formula import Group
from attn_compiler.targets.onnx.nodes import Nodes
from attn_compiler.targets.onnx.scan import scan
from attn_compiler.targets.onnx.scope import Scope


def either(group: Group, below: int) -> ir.Value:
    """Decide by the number of queries when the function runs."""
    scope = group.scope
    nodes = scope.nodes

    def branch(run: Callable[[Group], ir.Value]) -> Callable[[Nodes], tuple[Sequence[ir.Value], Sequence[ir.Value]]]:
        def write(inner: Nodes) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
            here = Scope(scope.spec, inner, scope.inputs, scope.heads, scope.queries, scope.keys, scope)
            return [], [run(replace(group, scope=here))]

        return write

    few = nodes.op("Less", nodes.index(scope.queries.count), nodes.index(below))
    then, otherwise = nodes.inside(branch(dense), "few"), nodes.inside(branch(scan), "many")
    return nodes.op("If", few, then_branch=then, else_branch=otherwise)
