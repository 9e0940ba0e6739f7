"""Mixes what branches computed, as ONNX nodes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce

import onnx_ir as ir

from attn_compiler.algebra.variant import How, Mix
from attn_compiler.targets.onnx.nodes import Nodes
from attn_compiler.targets.onnx.scope import Scope


def mixed(scope: Scope, mix: Mix, outs: Sequence[ir.Value]) -> ir.Value:
    """The results of branches, each times its weight; for a shared denominator, sums whose last column is that of weights."""
    nodes = scope.nodes
    spelled = (weight.substitute(scope.spec.sizes) for weight in mix.weights)
    weighed = [nodes.op("Mul", out, scope.scores.real_tensor(weight)) for out, weight in zip(outs, spelled, strict=True)]
    whole = reduce(partial(nodes.op, "Add"), weighed)
    return whole if mix.how is How.SUM else _divided(nodes, whole, scope)


def _divided(nodes: Nodes, sums: ir.Value, scope: Scope) -> ir.Value:
    width = scope.spec.value_dim
    mass, zero = nodes.slice(sums, 3, width, width + 1), nodes.constant(0, scope.real)
    none = nodes.op("Equal", mass, zero)
    found = nodes.op("Div", nodes.slice(sums, 3, 0, width), nodes.op("Where", none, nodes.constant(1, scope.real), mass))
    return nodes.op("Where", none, zero, found)
