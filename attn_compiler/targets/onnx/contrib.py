"""onnxruntime's own operators, where they compute the same: `GroupQueryAttention` and `LinearAttention`."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from attn_compiler.targets.onnx.formula import Group
from attn_compiler.targets.onnx.nodes import Attribute, Nodes, Value
from attn_compiler.targets.onnx.states import Tokens

DOMAIN = "com.microsoft"


def group_query(group: Group, shown: int) -> ir.Value:
    """The output where queries see the latest keys up to their own, as `window` counts them."""
    scope, nodes, spec = group.scope, group.scope.nodes, group.scope.spec
    length = nodes.op("Cast", nodes.index(scope.keys.count), to=int(ir.DataType.INT32))
    last = nodes.op("Sub", length, nodes.op("Cast", nodes.index(1), to=int(ir.DataType.INT32)))
    rows = nodes.op("Expand", last, nodes.vector(nodes.size(group.block.q, 0)))
    given = [packed(nodes, x) for x in (group.block.q, group.block.k, group.block.v)]
    results = [nodes.named(name) for name in ("grouped", "keys", "values")]
    nodes.write(
        "GroupQueryAttention",
        [*given, None, None, rows, length],
        results,
        {"num_heads": len(scope.heads), "kv_num_heads": group.block.kv_heads, "scale": 1.0, "local_window_size": shown},
        DOMAIN,
    )
    return unpacked(nodes, results[0], len(scope.heads), spec.value_dim)


def linear_attention(tokens: Tokens) -> ir.Value:
    """What all queries gather."""
    scope, block = tokens.group.scope, tokens.group.block
    nodes = scope.nodes
    given = [packed(nodes, nodes.slice(x, 2, 0, scope.queries.count)) for x in (block.q, tokens.k, tokens.v)]
    results = [nodes.named(name) for name in ("gathered", "state")]
    attributes: Mapping[str, Attribute] = {
        "q_num_heads": len(scope.heads),
        "kv_num_heads": block.kv_heads,
        "update_rule": "linear",
        "scale": 1.0,
    }
    nodes.write("LinearAttention", given, results, attributes, DOMAIN)
    return unpacked(nodes, results[0], len(scope.heads), scope.spec.value_dim + 1)


def packed(nodes: Nodes, x: ir.Value) -> ir.Value:
    """From [batch, heads, tokens, dim] to tokens before heads, and these side by side."""
    return nodes.reshape(nodes.op("Transpose", x, perm=[0, 2, 1, 3]), 0, 0, -1)


def unpacked(nodes: Nodes, x: ir.Value, heads: int, dim: Value) -> ir.Value:
    """Back again."""
    return nodes.op("Transpose", nodes.reshape(x, 0, 0, heads, dim), perm=[0, 2, 1, 3])
