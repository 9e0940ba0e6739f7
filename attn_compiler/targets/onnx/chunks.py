"""Tokens in chunks of one size, the last one filled up."""

from __future__ import annotations

import onnx_ir as ir

from attn_compiler.algebra import expr as e
from attn_compiler.targets.linear import NEAR
from attn_compiler.targets.onnx.cut import counting
from attn_compiler.targets.onnx.nodes import Nodes, Value


def power_of_two(count: Value) -> int:
    """The size of a chunk that is halved down to single tokens."""
    return min(NEAR, 1 << (count - 1).bit_length()) if isinstance(count, int) else NEAR


def in_chunks(nodes: Nodes, count: Value, size: int) -> tuple[Value, Value]:
    """How many chunks so many tokens are, and how many are missing in the last one."""
    counter = counting(nodes, {e.k_len: count})
    chunks = (e.k_len + size - 1) // size
    return counter.read(chunks), counter.read(chunks * size - e.k_len)


def padded(nodes: Nodes, x: ir.Value, axis: int, front: Value, end: Value, mode: str = "constant") -> ir.Value:
    """More tokens in front and behind."""
    if front == 0 and end == 0:
        return x
    pads: list[Value] = [0] * 8
    pads[axis], pads[4 + axis] = front, end
    return nodes.op("Pad", x, nodes.vector(*pads), mode=mode)


def plus(nodes: Nodes, a: Value, b: Value) -> Value:
    """A sum of counts."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return a if b == 0 else b if a == 0 else nodes.op("Add", nodes.index(a), nodes.index(b))
