"""A loop over blocks of queries, each of which meets only the keys in reach: time and memory grow with the reach."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort, maximum, minimum, symbol
from attn_compiler.targets.onnx.formula import Group, attend
from attn_compiler.targets.onnx.nodes import Nodes, Value
from attn_compiler.targets.onnx.printer import Printer
from attn_compiler.targets.onnx.scope import Joined, Neighbors, Scope, Tokens
from attn_compiler.targets.reach import Sides

ROWS = 128  # queries of a block: fewer cost calls, more cost keys that only some of them see
START, SIZE, FIRST = (symbol(name, Sort.INDEX) for name in ("start", "size", "first"))  # of a block; the first query's position
ROUNDED = (e.q_len + SIZE - 1) // SIZE * SIZE  # queries of all blocks


def scan(group: Group) -> ir.Value:
    """Blocks of one size, the last one moved back to where it fits: its first queries are computed twice."""
    scope, first, sides = group.scope, group.first, group.sides
    assert first is not None
    nodes = scope.nodes
    sizes: dict[Expr, Value] = {e.q_len: scope.queries.count, e.k_len: scope.keys.count}
    sizes[SIZE] = _counter(nodes, sizes).read(minimum(e.q_len, ROWS))
    sizes[FIRST] = scope.masks.read(first)
    counter = _counter(nodes, sizes)
    starts = nodes.op("Mul", nodes.range(0, counter.read(ROUNDED // SIZE)), nodes.index(sizes[SIZE]))
    starts = nodes.op("Min", starts, nodes.index(counter.read(e.q_len - SIZE)))

    def step(inner: Nodes) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
        start = ir.Value(name=inner.named("start").name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
        local = _counter(inner, {**sizes, START: start})
        queries = Neighbors(start, local.read(START + SIZE), sizes[SIZE])
        keys = _in_reach(sides, local)
        block = replace(
            group.block,
            q=queries.pick(inner, group.block.q, 2),
            k=keys.pick(inner, group.block.k, 2),
            v=keys.pick(inner, group.block.v, 2),
        )
        here = Scope(scope.spec, inner, scope.operands, scope.heads, queries, keys, scope)
        return [start], [attend(replace(group, scope=here, block=block))]

    body = nodes.inside(step, "block")
    stacked = nodes.op("Scan", starts, num_scan_inputs=1, scan_output_axes=[2], body=body)
    return _joined(nodes, nodes.reshape(stacked, 0, len(scope.heads), -1, scope.spec.value_dim), counter)


def _counter(nodes: Nodes, known: Mapping[Expr, Value]) -> Printer:
    """Prints what is counted: lengths, and where blocks begin and end."""
    return Printer(nodes, lambda leaf, _: known[leaf], "float64")


def _in_reach(sides: Sides, local: Printer) -> Tokens:
    """The keys that a block of queries may see, at least one; what they do not see is hidden by the mask."""
    position, prefix = FIRST + START, minimum(sides.prefix, e.k_len)
    start: Expr = e.const(0) if math.isinf(sides.farthest) else minimum(maximum(position - int(sides.farthest), 0), e.k_len - 1)
    stop = e.k_len if math.isinf(sides.nearest) else position + SIZE - int(sides.nearest)
    stop = minimum(maximum(maximum(stop, prefix), start + 1), e.k_len)
    near = Neighbors(local.read(start), local.read(stop), local.read(stop - start))
    if not sides.prefix or math.isinf(sides.farthest):
        return near
    ahead = local.read(minimum(prefix, start))
    return Joined((Neighbors(0, ahead, ahead), near), local.read(minimum(prefix, start) + stop - start))


def _joined(nodes: Nodes, rows: ir.Value, counter: Printer) -> ir.Value:
    """All queries in order, those of the last block that were computed twice left out."""
    if counter.read(ROUNDED - e.q_len) == 0:
        return rows
    whole = nodes.slice(rows, 2, 0, counter.read(ROUNDED - SIZE))
    rest = nodes.slice(rows, 2, counter.read(ROUNDED * 2 - SIZE - e.q_len), counter.read(ROUNDED))
    return nodes.op("Concat", whole, rest, axis=2)
