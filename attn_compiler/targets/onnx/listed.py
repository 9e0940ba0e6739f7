"""A loop over blocks of queries, each of which meets tiles of keys from a list: any pattern, where lengths are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import true
from attn_compiler.planning.runs import Integers
from attn_compiler.targets.onnx.formula import Group, attend
from attn_compiler.targets.onnx.nodes import Nodes
from attn_compiler.targets.onnx.scope import Blocks, Scope
from attn_compiler.targets.operands import PLACE
from attn_compiler.targets.walk import Walk


def listed(group: Group, walk: Walk) -> ir.Value:
    """Tokens are laid out in the orders of the walk once, then cut into tiles."""
    scope, spec = group.scope, group.scope.spec
    q_len, k_len = spec.q_len, spec.k_len
    assert isinstance(q_len, int)
    assert isinstance(k_len, int)
    nodes, blocks = scope.nodes, len(walk.begin)
    order = _filled(np.arange(q_len) if walk.q_order is None else walk.q_order, blocks * walk.rows)
    natural = walk.q_order is None and q_len == len(order)
    q = group.block.q if natural else nodes.op("Gather", group.block.q, nodes.constant(order, "int64"), axis=2)
    k, v = (_tiles(nodes, x, walk, k_len) for x in (group.block.k, group.block.v))
    exists = e.apply("lt", PLACE, k_len) if k_len % walk.keys else true
    variant = replace(group.variant, mask=exists if walk.full else group.variant.mask & exists)

    def step(inner: Nodes) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
        start, begin, end = (
            ir.Value(name=inner.named(name).name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
            for name in ("start", "begin", "end")
        )
        stop = inner.op("Add", start, inner.index(walk.rows))
        rows = inner.slice(nodes.constant(order, "int64"), 0, start, stop)
        queries = Blocks(rows, rows, walk.rows)
        tiles = inner.slice(nodes.constant(walk.tiles, "int64"), 0, begin, end)
        keys = _keys(inner, tiles, walk, k_len)
        here = Scope(spec, inner, scope.inputs, scope.heads, queries, keys, scope)
        kv_heads = group.block.kv_heads
        met = [
            inner.reshape(inner.op("Gather", x, tiles, axis=2), 0, kv_heads, -1, dim)
            for x, dim in ((k, spec.dim), (v, spec.value_dim))
        ]
        block = replace(group.block, q=inner.slice(q, 2, start, stop), k=met[0], v=met[1])
        return [start, begin, end], [attend(replace(group, scope=here, block=block, variant=variant))]

    scanned = [nodes.constant(x, "int64") for x in (np.arange(blocks) * walk.rows, walk.begin, walk.end)]
    stacked = nodes.op("Scan", *scanned, num_scan_inputs=3, scan_output_axes=[2], body=nodes.inside(step, "block"))
    out = nodes.reshape(stacked, 0, len(scope.heads), len(order), spec.value_dim)
    if walk.q_order is not None:
        return nodes.op("Gather", out, nodes.constant(np.argsort(walk.q_order), "int64"), axis=2)
    return out if natural else nodes.slice(out, 2, 0, q_len)


def _filled(order: Integers, length: int) -> Integers:
    """The last token stands for those that are missing in the last tile."""
    return np.concatenate([order, np.repeat(order[-1:], length - len(order))])


def _tiles(nodes: Nodes, x: ir.Value, walk: Walk, length: int) -> ir.Value:
    """[batch, heads, tiles, tokens of a tile, dim]."""
    if walk.k_order is not None:
        x = nodes.op("Gather", x, nodes.constant(walk.k_order, "int64"), axis=2)
    missing = -length % walk.keys
    if missing:
        x = nodes.op("Pad", x, nodes.constant([0, missing], "int64"), None, nodes.vector(2))
    return nodes.op("Reshape", x, nodes.constant([0, 0, (length + missing) // walk.keys, walk.keys, -1], "int64"))


def _keys(nodes: Nodes, tiles: ir.Value, walk: Walk, length: int) -> Blocks:
    """The original places of the keys in some tiles."""
    firsts = nodes.op("Unsqueeze", nodes.op("Mul", tiles, nodes.index(walk.keys)), nodes.vector(1))
    places = nodes.reshape(nodes.op("Add", firsts, nodes.range(0, walk.keys)), -1)
    count = nodes.size(places, 0)
    if not length % walk.keys and walk.k_order is None:
        return Blocks(places, places, count)
    inside = nodes.op("Min", places, nodes.index(length - 1))
    if walk.k_order is None:
        return Blocks(places, inside, count)
    order = np.concatenate([walk.k_order, np.arange(length, length + -length % walk.keys)])
    return Blocks(
        nodes.op("Gather", nodes.constant(order, "int64"), places),
        nodes.op("Gather", nodes.constant(walk.k_order, "int64"), inside),
        count,
    )
