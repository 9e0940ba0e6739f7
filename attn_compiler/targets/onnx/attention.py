"""Blocks of queries as the heads of one `Attention`, ONNX's own operator."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from attn_compiler.algebra import expr as e
from attn_compiler.targets.onnx.formula import Group, may_be_infinite
from attn_compiler.targets.onnx.nodes import Value
from attn_compiler.targets.onnx.operators import added
from attn_compiler.targets.onnx.scope import Scope


def attend(group: Group) -> ir.Value:
    """The output for blocks side by side. The operator's batch are rows and the heads of k, its heads are blocks."""
    scope, nodes, spec = group.scope, group.scope.nodes, group.scope.spec
    blocks, _, keys = _sizes(scope)
    sides = ((group.block.k, spec.dim), (group.block.v, spec.value_dim))
    k, v = (nodes.reshape(x, -1, blocks, keys, dim) for x, dim in sides)
    bias = _bias(group)
    given = None if bias is None else _by_blocks(group, bias)
    out = nodes.op("Attention", _below(group, group.block.q, spec.dim), k, v, given, scale=1.0)
    out = _apart(group, out)
    if bias is None or group.empty is None:
        return out
    sees = nodes.op("Greater", nodes.op("ReduceMax", bias, nodes.vector(-1), keepdims=1), _lowest(scope))
    return nodes.op("Where", sees, out, group.empty)


def _sizes(scope: Scope) -> tuple[Value, Value, Value]:
    assert scope.blocks is not None
    return scope.blocks, scope.queries.count, scope.keys.count


def _lowest(scope: Scope) -> ir.Value:
    return scope.nodes.constant(np.finfo(scope.real).min, scope.real)


def _bias(group: Group) -> ir.Value | None:
    """What is added to the products of q and k: a score so low that its weight is zero where the mask hides."""
    scope, variant, nodes = group.scope, group.variant, group.scope.nodes
    rest, visible = added(variant.score), scope.masks.read(variant.mask)
    assert rest is not None
    number = scope.scores.real_tensor(rest)
    if visible is True:
        return None if rest == e.const(0.0) else nodes.op("Max", number, _lowest(scope))
    shown = visible if isinstance(visible, ir.Value) else nodes.constant([[[False]]], "bool")
    found = nodes.op("Where", shown, number, _lowest(scope))
    return nodes.op("Max", found, _lowest(scope)) if may_be_infinite(variant.score) else found


def _by_blocks(group: Group, bias: ir.Value) -> ir.Value:
    """The same as the operator is given it."""
    scope, nodes, heads = group.scope, group.scope.nodes, len(group.scope.heads)
    blocks, rows, keys = _sizes(scope)
    times = heads // group.block.kv_heads
    if group.variant.mask.mentions(e.b, e.h, e.kv) or group.variant.score.mentions(e.b, e.h, e.kv):
        batch = nodes.size(group.block.q, 0)
        return _below(group, nodes.op("Expand", bias, nodes.vector(batch, heads, blocks, rows, keys)), keys)
    alike = nodes.op("Expand", bias, nodes.vector(1, blocks, rows, keys))
    return nodes.op("Concat", *[alike] * times, axis=2) if times > 1 else alike


def _below(group: Group, x: ir.Value, width: Value) -> ir.Value:
    """From [batch, heads, blocks, rows, width]: the rows of heads that share keys stand below each other."""
    scope, nodes, kv_heads = group.scope, group.scope.nodes, group.block.kv_heads
    blocks, rows, _ = _sizes(scope)
    times = len(scope.heads) // kv_heads
    if times > 1:
        apart = nodes.reshape(x, 0, kv_heads, times, blocks, rows, width)
        x = nodes.op("Transpose", apart, perm=[0, 1, 3, 2, 4, 5])
        rows = nodes.op("Mul", nodes.index(rows), nodes.index(times))
    return nodes.reshape(x, -1, blocks, rows, width)


def _apart(group: Group, x: ir.Value) -> ir.Value:
    """Back to [batch, heads, blocks, rows, value dim]."""
    scope, nodes, kv_heads, width = group.scope, group.scope.nodes, group.block.kv_heads, group.scope.spec.value_dim
    blocks, rows, _ = _sizes(scope)
    times = len(scope.heads) // kv_heads
    if times > 1:
        below = nodes.reshape(x, -1, kv_heads, blocks, times, rows, width)
        x = nodes.op("Transpose", below, perm=[0, 1, 3, 2, 4, 5])
    return nodes.reshape(x, -1, len(scope.heads), blocks, rows, width)
