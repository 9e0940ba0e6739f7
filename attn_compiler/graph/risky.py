"""Finds the biases that may hide keys by huge numbers, as only run time can tell, where gradients are wanted.

A row in which such a number swallows every score has a log-sum-exp that cannot say how many keys it has. The fused operator
derives its gradients from that, and gets them wrong; so does Inductor, which fuses what a model writes out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import fx

from attn_compiler import torch_private as private
from attn_compiler.algebra.expr import Sort
from attn_compiler.graph.calls import call, dtype
from attn_compiler.graph.record import GraphSite
from attn_compiler.graph.symbolic import Table
from attn_compiler.targets.fused import HUGE

# What makes numbers of moderate size, whatever it is given.
_MODERATE = frozenset(
    ("mm", "bmm", "matmul", "linear", "addmm", "baddbmm", "embedding", "layer_norm", "softmax", "scaled_dot_product_attention")
)


def risky_tables(found: GraphSite, tables: Mapping[str, Table], recorded: frozenset[fx.Node]) -> frozenset[str]:
    """The names of tables that may hold huge numbers; none where no gradients are recorded."""
    if recorded.isdisjoint(x.node for x in (found.q, found.k, found.v)):
        return frozenset()
    real = {name: table.node for name, table in tables.items() if table.sort is Sort.REAL and table.dim is None}
    return frozenset(name for name, node in real.items() if any(_is_risky(origin, recorded) for origin in _origins(node)))


def _origins(node: fx.Node) -> Iterator[fx.Node]:
    """What the numbers of a tensor come from, as far as they are moved and combined one by one."""
    seen, waiting = {node}, [node]
    while waiting:
        current = waiting.pop()
        yield current
        if call(current).op not in _MODERATE:
            new = [x for x in current.all_input_nodes if x not in seen]
            seen.update(new)
            waiting += new


def _is_risky(node: fx.Node, recorded: frozenset[fx.Node]) -> bool:
    """A huge constant, or an input of real numbers that nobody trains."""
    if node.op == "placeholder":
        real = dtype(node)
        return real is not None and real.is_floating_point and not private.is_parameter(node) and node not in recorded
    constants = [x for x in private.tree_leaves((node.args, node.kwargs)) if isinstance(x, float) and math.isfinite(x)]
    return node.op == "call_function" and call(node).op not in _MODERATE and any(abs(x) >= HUGE for x in constants)
