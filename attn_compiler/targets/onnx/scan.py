"""A loop over blocks of queries, each of which meets only the keys in reach: time and memory grow with the reach."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort, maximum, minimum, symbol
from attn_compiler.targets.onnx.choice import ROWS
from attn_compiler.targets.onnx.formula import Group, attend
from attn_compiler.targets.onnx.nodes import Nodes, Value
from attn_compiler.targets.onnx.printer import Printer
from attn_compiler.targets.onnx.scope import Joined, Neighbors, Scope, Tokens

# Queries of a dilated mask are sorted by their remainder by STEP; BLOCK counts the blocks of all remainders, SIZE is that of each
# of them, EACH how many each remainder has. FIRST is the position of the first query.
STEP, BLOCK, SIZE, EACH, FIRST = (symbol(name, Sort.INDEX) for name in ("step", "block", "size", "each", "first"))
REMAINDER = BLOCK // EACH
START = minimum(BLOCK % EACH * SIZE, (e.q_len - REMAINDER + STEP - 1) // STEP - SIZE) * STEP + REMAINDER


def scan(group: Group) -> ir.Value:
    """Blocks of one size, the last of each remainder moved back to where it fits: its first queries are computed twice."""
    scope, first = group.scope, group.first
    assert first is not None
    nodes = scope.nodes
    sizes: dict[Expr, Value] = {e.q_len: scope.queries.count, e.k_len: scope.keys.count, FIRST: scope.masks.read(first)}
    sizes[STEP] = counting(nodes, sizes).read(minimum(group.step, e.q_len)) if group.step > 1 else 1
    sizes[SIZE] = counting(nodes, sizes).read(minimum(e.q_len // STEP, ROWS))
    sizes[EACH] = counting(nodes, sizes).read(((e.q_len + STEP - 1) // STEP + SIZE - 1) // SIZE)
    counter = counting(nodes, sizes)

    def step(inner: Nodes) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
        number = ir.Value(name=inner.named("block").name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
        local = counting(inner, {**sizes, BLOCK: number})
        stop = local.read(START + (SIZE - 1) * STEP + 1)
        queries = Neighbors(local.read(START), stop, sizes[SIZE], sizes[STEP])
        keys = _in_reach(group, local, sizes[STEP])
        q, k, v = queries.pick(inner, group.block.q, 2), keys.pick(inner, group.block.k, 2), keys.pick(inner, group.block.v, 2)
        here = Scope(scope.spec, inner, scope.inputs, scope.heads, queries, keys, scope)
        return [number], [attend(replace(group, scope=here, block=replace(group.block, q=q, k=k, v=v)))]

    blocks = nodes.range(0, counter.read(EACH * STEP))
    stacked = nodes.op("Scan", blocks, num_scan_inputs=1, scan_output_axes=[2], body=nodes.inside(step, "block"))
    rows = nodes.reshape(stacked, 0, len(scope.heads), -1, scope.spec.value_dim)
    return _in_order(nodes, rows, counter) if group.step > 1 else _joined(nodes, rows, counter)


def counting(nodes: Nodes, known: Mapping[Expr, Value]) -> Printer:
    """Prints what is counted: lengths, and where blocks begin and end."""
    return Printer(nodes, lambda leaf, _: known[leaf], "float64")


def _in_reach(group: Group, local: Printer, step: Value) -> Tokens:
    """The keys that a block of queries may see, at least one; what they do not see is hidden by the mask."""
    sides, position, prefix = group.sides, FIRST + START, minimum(group.sides.prefix, e.k_len)
    start: Expr = e.const(0)
    if group.step > 1:
        back = position if math.isinf(sides.farthest) else minimum(position, int(sides.farthest))
        start = position - back // STEP * STEP
    elif not math.isinf(sides.farthest):
        start = minimum(maximum(position - int(sides.farthest), 0), e.k_len - 1)
    stop = e.k_len if math.isinf(sides.nearest) else position + (SIZE - 1) * STEP + 1 - int(sides.nearest)
    stop = minimum(maximum(maximum(stop, prefix), start + 1), e.k_len)
    count = (stop - start + STEP - 1) // STEP
    near = Neighbors(local.read(start), local.read(stop), local.read(count), step)
    if not sides.prefix or math.isinf(sides.farthest):
        return near
    ahead = local.read(minimum(prefix, start))
    return Joined((Neighbors(0, ahead, ahead), near), local.read(minimum(prefix, start) + count))


def _joined(nodes: Nodes, rows: ir.Value, counter: Printer) -> ir.Value:
    """All queries in order, those of the last block that were computed twice left out."""
    rounded = EACH * SIZE
    if counter.read(rounded - e.q_len) == 0:
        return rows
    whole = nodes.slice(rows, 2, 0, counter.read(rounded - SIZE))
    rest = nodes.slice(rows, 2, counter.read(rounded * 2 - SIZE - e.q_len), counter.read(rounded))
    return nodes.op("Concat", whole, rest, axis=2)


def _in_order(nodes: Nodes, rows: ir.Value, counter: Printer) -> ir.Value:
    """The same where queries were sorted by their remainders."""
    token = {e.i: nodes.range(0, counter.read(e.q_len))}
    printer = Printer(nodes, lambda leaf, _: token[leaf] if leaf in token else counter.read(leaf), "float64")
    block = e.i % STEP * EACH + e.i // STEP // SIZE
    start = START.substitute({BLOCK: block})
    return nodes.op("Gather", rows, nodes.index(printer.read(block * SIZE + (e.i - start) // STEP)), axis=2)
