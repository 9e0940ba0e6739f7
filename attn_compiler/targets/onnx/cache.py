"""A cache inside of a function: new keys follow those of the past, and the next call is given no more than it needs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from attn_compiler.targets.onnx.nodes import Nodes


def appended(nodes: Nodes, past: ir.Value, new: ir.Value) -> ir.Value:
    """All keys, in order."""
    return nodes.op("Concat", past, new, axis=2)


def let_go(nodes: Nodes, x: ir.Value, first: int, latest: int) -> ir.Value:
    """The first of them and the latest."""
    length = nodes.size(x, 2)
    start = nodes.op("Max", nodes.op("Sub", length, nodes.index(latest)), nodes.index(first))
    near = nodes.slice(x, 2, start, length)
    return nodes.op("Concat", nodes.slice(x, 2, 0, first), near, axis=2) if first else near


def latest_of(nodes: Nodes, table: ir.Value, keys: ir.Value) -> ir.Value:
    """What a table along all tokens holds of the keys that are there, the latest ones."""
    count = nodes.vector(nodes.size(keys, 2))
    return nodes.op("Slice", table, nodes.op("Neg", count), nodes.vector(np.iinfo(np.int64).max), nodes.vector(-1))
