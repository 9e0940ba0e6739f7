"""The delta rule as ONNX nodes: what each key really adds to the state takes the place of its value (`targets/corrected.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Sort
from attn_compiler.targets.linear import Linear
from attn_compiler.targets.onnx.chunks import in_chunks, padded, plus, power_of_two
from attn_compiler.targets.onnx.faded import fading, log_before, logs_of
from attn_compiler.targets.onnx.formula import Group
from attn_compiler.targets.onnx.mapped import by_query_heads
from attn_compiler.targets.onnx.nodes import Nodes, Value
from attn_compiler.targets.onnx.scope import Neighbors
from attn_compiler.targets.operands import PLACE

_FEW = 16  # keys whose system is inverted; those of a chunk follow block by block


def corrected(group: Group, found: Linear | None, width: int, past: ir.Value | None = None) -> Group:
    """The same where `width` columns of the values are what keys add, and no rule is left.

    `past` are the sums of feature * value of the keys before all of these.
    """
    scope, delta = group.scope, group.variant.delta
    if delta is None:
        return group
    assert found is not None
    nodes, block = scope.nodes, by_query_heads(scope, group.block)
    whole, zero = nodes.vector(1, 1, 1, scope.keys.count), nodes.constant(0, scope.real)
    beta = nodes.turned(nodes.op("Expand", scope.scores.real_tensor(delta), whole))
    k, v = block.k, nodes.slice(block.v, 3, 0, width)
    shown = scope.masks.read(found.shown.substitute({**scope.spec.sizes, e.k: PLACE}))
    if shown is not True:
        exists = nodes.turned(nodes.op("Expand", scope.masks.tensor(shown, Sort.BOOL), whole))
        k, v, beta = (nodes.op("Where", exists, x, zero) for x in (k, v, beta))
    logs = None
    if found.fades is not None:
        log = logs_of(scope, found.fades)[1]
        logs = log, nodes.slice(log, 2, 0, 1) if past is None else log_before(scope, found.fades)
    if past is None:
        past = nodes.op("Expand", zero, nodes.vector(*(nodes.size(k, axis) for axis in (0, 1, 3)), width))
    v = _Keys(nodes, scope.real, k, v, beta, logs).added(past, scope.keys.count, width)
    if width < scope.spec.value_dim:
        v = nodes.op("Concat", v, nodes.slice(block.v, 3, width, scope.spec.value_dim), axis=3)
    return replace(group, block=replace(block, v=v), variant=replace(group.variant, delta=None))


@dataclass(frozen=True)
class _Keys:
    """Keys and values, how much of what a key differs from the state is learned, and running logs: columns, and before them."""

    nodes: Nodes
    real: str
    k: ir.Value
    v: ir.Value
    beta: ir.Value
    logs: tuple[ir.Value, ir.Value] | None

    def added(self, past: ir.Value, count: Value, width: int) -> ir.Value:
        """What all keys add, a chunk after the other."""
        nodes, size = self.nodes, power_of_two(count)
        chunks, rest = in_chunks(nodes, count, size)
        k, v, beta = (padded(nodes, x, 2, 0, rest) for x in (self.k, self.v, self.beta))
        logs = self.logs and (padded(nodes, self.logs[0], 2, 0, rest, mode="edge"), self.logs[1])
        stacked = replace(self, k=k, v=v, beta=beta, logs=logs).by_chunks(past, chunks, size)
        rows = nodes.reshape(stacked, 0, 0, -1, width)
        return rows if rest == 0 else nodes.slice(rows, 2, 0, count)

    def by_chunks(self, past: ir.Value, chunks: Value, size: int) -> ir.Value:
        """The same where the last chunk is full, [batch, heads, chunks, keys, width]."""

        def step(inner: Nodes, number: ir.Value, given: Sequence[ir.Value]) -> tuple[Sequence[ir.Value], ir.Value]:
            start = inner.op("Mul", number, inner.index(size))
            return self._chunk(inner, Neighbors(start, plus(inner, start, size), size), size, given)

        state = [past, *(self.logs[1:] if self.logs else ())]
        types = [self.real, *("float64" for _ in state[1:])]
        return self.nodes.carrying(step, state, types, self.nodes.range(0, chunks))[1]

    def _chunk(self, nodes: Nodes, here: Neighbors, size: int, given: Sequence[ir.Value]) -> tuple[Sequence[ir.Value], ir.Value]:
        """The state after a chunk of keys, and what these add."""
        k, v, beta = (here.pick(nodes, x, 2) for x in (self.k, self.v, self.beta))
        near, reached, kept, left, ends = nodes.op("MatMul", k, nodes.turned(k)), k, k, given[0], []
        if self.logs:
            log, before = here.pick(nodes, self.logs[0], 2), given[1]
            end = nodes.slice(log, 2, size - 1, size)
            near = nodes.op("Mul", near, fading(nodes, log, nodes.turned(log), self.real))
            reached = nodes.op("Mul", k, fading(nodes, log, before, self.real))
            kept = nodes.op("Mul", k, fading(nodes, end, log, self.real))
            left, ends = nodes.op("Mul", left, fading(nodes, end, before, self.real)), [end]
        system = nodes.op("Trilu", nodes.op("Mul", near, beta), nodes.index(-1), upper=0)
        differs = nodes.op("Sub", v, nodes.op("MatMul", reached, given[0]))
        added = solved(nodes, system, nodes.op("Mul", beta, differs), size, self.real)
        return [nodes.op("Add", left, nodes.op("MatMul", nodes.turned(kept), added)), *ends], added


def solved(nodes: Nodes, system: ir.Value, right: ir.Value, size: int, real: str) -> ir.Value:
    """x where (I + system) x = right, the system being strictly below its diagonal: block by block, as by substitution.

    A power of the system may overflow where its inverse is small; no product here is further from that than the inverse is.
    """
    few = min(size, _FEW)
    inverses = _inverse(nodes, _diagonal(nodes, system, size, few), few, real)
    parts: list[ir.Value] = []
    for at in range(size // few):
        start = at * few
        rest = nodes.slice(right, 2, start, start + few)
        if parts:
            rows = nodes.slice(nodes.slice(system, 2, start, start + few), 3, 0, start)
            before = nodes.op("Concat", *parts, axis=2) if len(parts) > 1 else parts[0]
            rest = nodes.op("Sub", rest, nodes.op("MatMul", rows, before))
        inverse = nodes.op("Squeeze", nodes.slice(inverses, 2, at, at + 1), nodes.vector(2))
        parts.append(nodes.op("MatMul", inverse, rest))
    return nodes.op("Concat", *parts, axis=2) if len(parts) > 1 else parts[0]


def _diagonal(nodes: Nodes, system: ir.Value, size: int, few: int) -> ir.Value:
    """Its blocks on the diagonal, [batch, heads, blocks, few, few]."""
    row, column = np.arange(size).reshape(-1, few, 1), np.arange(size).reshape(-1, 1, few)
    flat = nodes.reshape(system, 0, 0, -1)
    return nodes.op("Gather", flat, nodes.constant(row * size + column, "int64"), axis=2)


def _inverse(nodes: Nodes, system: ir.Value, few: int, real: str) -> ir.Value:
    """The inverses of I + system: those of blocks twice as long follow from those on their diagonals and their corners."""
    place, inverse, block = np.arange(few), nodes.constant(np.eye(few), real), 1
    while block < few:
        pair, second = place // (2 * block), place // block % 2 == 1
        corners = (pair[:, None] == pair) & second[:, None] & ~second
        corner = nodes.op("Where", nodes.constant(corners, "bool"), system, nodes.constant(0, real))
        between = corner if block == 1 else nodes.op("MatMul", nodes.op("MatMul", inverse, corner), inverse)
        inverse, block = nodes.op("Sub", inverse, between), 2 * block
    return inverse if few > 1 else nodes.op("Expand", inverse, nodes.op("Shape", system))
