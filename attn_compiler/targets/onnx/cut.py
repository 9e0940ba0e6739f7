"""How queries are cut into blocks of one size, and which keys are in reach of each: as expressions over the block's number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort, maximum, minimum, symbol
from attn_compiler.targets.onnx.choice import ROWS
from attn_compiler.targets.onnx.formula import Group
from attn_compiler.targets.onnx.nodes import Nodes, Value
from attn_compiler.targets.onnx.printer import Printer

# Queries of a dilated mask are sorted by their remainder by STEP; BLOCK counts the blocks of all remainders, SIZE is that of each
# of them, EACH how many each remainder has. FIRST is the position of the first query. The last block of each remainder is moved
# back to where it fits: its first queries are computed twice.
STEP, BLOCK, SIZE, EACH, FIRST = (symbol(name, Sort.INDEX) for name in ("step", "block", "size", "each", "first"))
REMAINDER = BLOCK // EACH
START = minimum(BLOCK % EACH * SIZE, (e.q_len - REMAINDER + STEP - 1) // STEP - SIZE) * STEP + REMAINDER


@dataclass(frozen=True)
class Reached:
    """The keys `start`, `start + STEP`, … before `stop` that a block may see, besides `ahead` first ones; `most` in any block."""

    start: Expr
    stop: Expr
    ahead: Expr
    most: Expr


def sizes(group: Group) -> dict[Expr, Value]:
    """What the expressions mention besides BLOCK."""
    scope, first = group.scope, group.first
    assert first is not None
    nodes = scope.nodes
    found: dict[Expr, Value] = {e.q_len: scope.queries.count, e.k_len: scope.keys.count, FIRST: scope.masks.read(first)}
    found[STEP] = counting(nodes, found).read(minimum(group.step, e.q_len)) if group.step > 1 else 1
    found[SIZE] = counting(nodes, found).read(minimum(e.q_len // STEP, ROWS))
    found[EACH] = counting(nodes, found).read(((e.q_len + STEP - 1) // STEP + SIZE - 1) // SIZE)
    return found


def counting(nodes: Nodes, known: Mapping[Expr, Value]) -> Printer:
    """Prints what is counted: lengths, and where blocks begin and end."""
    return Printer(nodes, lambda leaf, _: known[leaf], "float64")


def reached(group: Group) -> Reached:
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
    ahead = minimum(prefix, start) if sides.prefix and not math.isinf(sides.farthest) else e.const(0)
    return Reached(start, stop, ahead, _most(group, prefix))


def _most(group: Group, prefix: Expr) -> Expr:
    """No block's neighbors are more than these."""
    sides = group.sides
    every = (e.k_len + STEP - 1) // STEP
    if math.isinf(sides.farthest) or math.isinf(sides.nearest):
        return every
    near = (int(sides.farthest - sides.nearest) + STEP) // STEP + SIZE - 1
    return minimum(maximum(near, prefix), every)


def together(group: Group, rows: ir.Value, counter: Printer) -> ir.Value:
    """The queries of all blocks, in their order, from one axis of the blocks' rows."""
    return _in_order(group.scope.nodes, rows, counter) if group.step > 1 else _joined(group.scope.nodes, rows, counter)


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
