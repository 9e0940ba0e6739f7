"""onnxruntime's own operators, where they compute the same: `GroupQueryAttention` and `LinearAttention`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from attn_compiler.targets.onnx.formula import Group
from attn_compiler.targets.onnx.nodes import DTYPES, Attribute, Nodes, Value
from attn_compiler.targets.onnx.states import Tokens

DOMAIN = "com.microsoft"


def group_query(group: Group, shown: int) -> ir.Value:
    """The output where queries see the latest keys up to their own, as `latest` counts them."""
    return _group_query(group, shown, group.scope.keys.count, [], {})[0]


def with_codes(group: Group, shown: int, past: Sequence[ir.Value], scales: Sequence[ir.Value], bits: int) -> tuple[ir.Value, ...]:
    """The same behind a past in codes, and the codes of all tokens."""
    nodes = group.scope.nodes
    keys = nodes.op("Add", nodes.size(past[0], 2), nodes.index(group.scope.queries.count))
    how: Mapping[str, Attribute] = {"kv_cache_bit_width": bits, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
    return _group_query(group, shown, keys, [*past, *scales], how)


def _group_query(
    group: Group, shown: int, keys: Value, cache: Sequence[ir.Value], how: Mapping[str, Attribute]
) -> tuple[ir.Value, ...]:
    """What it gives; of a `cache`, the past of keys and values, and the scales of both."""
    scope, nodes, block = group.scope, group.scope.nodes, group.block
    length = nodes.op("Cast", nodes.index(keys), to=int(ir.DataType.INT32))
    last = nodes.op("Cast", nodes.op("Sub", nodes.index(keys), nodes.index(1)), to=int(ir.DataType.INT32))
    rows = nodes.op("Expand", last, nodes.vector(nodes.size(block.q, 0)))
    given = [packed(nodes, x) for x in (block.q, block.k, block.v)]
    past: list[ir.Value | None] = [*cache[:2]] if cache else [None, None]
    scales: list[ir.Value | None] = [*[None] * 5, *cache[2:]] if cache else []
    results = [nodes.named(name) for name in ("grouped", "keys", "values")]
    sizes = {"num_heads": len(scope.heads), "kv_num_heads": block.kv_heads, "local_window_size": shown}
    nodes.write("GroupQueryAttention", [*given, *past, rows, length, *scales], results, {**sizes, "scale": 1.0, **how}, DOMAIN)
    return unpacked(nodes, results[0], len(scope.heads), scope.spec.value_dim), results[1], results[2]


def linear_attention(tokens: Tokens) -> ir.Value:
    """What all queries gather."""
    scope, block = tokens.group.scope, tokens.group.block
    nodes, count = scope.nodes, scope.queries.count
    given: list[ir.Value | None] = [packed(nodes, nodes.slice(x, 2, 0, count)) for x in (block.q, tokens.k, tokens.v)]
    if tokens.logs:
        given += [None, packed(nodes, _steps(nodes, nodes.slice(tokens.logs[1], 2, 0, count), block.q, scope.real))]
    results = [nodes.named(name) for name in ("gathered", "state")]
    attributes: Mapping[str, Attribute] = {
        "q_num_heads": len(scope.heads),
        "kv_num_heads": block.kv_heads,
        "update_rule": "gated" if tokens.logs else "linear",
        "scale": 1.0,
    }
    nodes.write("LinearAttention", given, results, attributes, DOMAIN)
    return unpacked(nodes, results[0], len(scope.heads), scope.spec.value_dim + 1)


def _steps(nodes: Nodes, log: ir.Value, q: ir.Value, real: str) -> ir.Value:
    """By how much running logs change at each token, for all rows and heads."""
    before = nodes.op("Concat", nodes.slice(log, 2, 0, 1), nodes.slice(log, 2, 0, -1), axis=2)
    steps = nodes.op("Min", nodes.op("Sub", log, before), nodes.constant(0.0, "float64"))
    rows = nodes.vector(nodes.size(q, 0), nodes.size(q, 1), 1, 1)
    return nodes.op("Expand", nodes.op("Cast", steps, to=int(DTYPES[real])), rows)


def packed(nodes: Nodes, x: ir.Value) -> ir.Value:
    """From [batch, heads, tokens, dim] to tokens before heads, and these side by side."""
    return nodes.reshape(nodes.op("Transpose", x, perm=[0, 2, 1, 3]), 0, 0, -1)


def unpacked(nodes: Nodes, x: ir.Value, heads: int, dim: Value) -> ir.Value:
    """Back again."""
    return nodes.op("Transpose", nodes.reshape(x, 0, 0, heads, dim), perm=[0, 2, 1, 3])
