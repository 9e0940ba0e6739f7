"""Puts a copy of an attention beside it, with its projections: what a decision makes of it can be compared with what it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from attn_compiler.errors import ShapeError
from attn_compiler.graph.calls import call
from attn_compiler.graph.describe import Described
from attn_compiler.graph.projections import between
from attn_compiler.graph.record import Operand


def beside(graph: fx.Graph, one: Described) -> tuple[Described, Sequence[tuple[fx.Node, fx.Node]]]:
    """The copy, and each result beside its copy: what takes the output, where that is known."""
    found = one.found
    ends = one.takers or (found.out.node,)
    copies: dict[fx.Node, fx.Node] = {}
    nodes = between((*one.makers, found.out.node), frozenset(ends))
    at = nodes[-1]
    if not {*one.makers} <= {*nodes} or any(call(node).writes and node.args[0] not in nodes for node in nodes):
        raise ShapeError(f"{found.name}: what its projections cost is measured without a cache that is written in place")
    for node in nodes:
        with graph.inserting_after(at):
            at = copies[node] = graph.node_copy(node, lambda x: copies.get(x, x))

    def copied(operand: Operand) -> Operand:
        return replace(operand, node=copies.get(operand.node, operand.node))

    q, k, v, out = map(copied, (found.q, found.k, found.v, found.out))
    earlier = one.unrotated and (copied(one.unrotated[0]), copied(one.unrotated[1]))
    makers, takers = (tuple(copies[node] for node in those) for those in (one.makers, one.takers))
    copy = replace(one, found=replace(found, q=q, k=k, v=v, out=out), unrotated=earlier, makers=makers, takers=takers)
    return copy, [(node, copies[node]) for node in ends]
