"""Reads the functions of a flex operator: what they make of a score, and which keys they show, over `b h i k`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from attn_compiler.algebra.bounds import Box
from attn_compiler.algebra.expr import Expr, Sort, b, const, h, i, k, score
from attn_compiler.graph.calls import Argument, value
from attn_compiler.graph.capture import capture
from attn_compiler.graph.symbolic import SymbolicReader
from attn_compiler.graph.symbolic_reading import Index, OpaqueError, as_bool

_SCORE, _BLOCKS, _SCORE_READS, _MASK_READS = 3, 4, 7, 8  # places of the operator's arguments
_WHOLE = 1 << 30  # the size of the one block there is when nobody gave any


def flex_score(gm: fx.GraphModule, node: fx.Node, outer: SymbolicReader, facts: Box) -> Expr:
    """What the function of scores makes of `score`. Raises OpaqueError where there is no formula."""
    return _function(gm, node, node.args[_SCORE], (score, b, h, i, k), _SCORE_READS, outer, facts)


def flex_mask(gm: fx.GraphModule, node: fx.Node, outer: SymbolicReader, facts: Box) -> Expr:
    """Which keys are seen: the function of the mask, which its table of blocks only summarizes."""
    blocks = node.args[_BLOCKS]
    assert isinstance(blocks, Sequence)
    shown = as_bool(_function(gm, node, blocks[-1], (b, h, i, k), _MASK_READS, outer, facts))
    if shown.is_const and any(size != _WHOLE for size in blocks[-3:-1]):
        raise OpaqueError  # blocks that no function explains
    return shown


def _function(
    gm: fx.GraphModule, node: fx.Node, body: Argument, given: Index, place: int, outer: SymbolicReader, facts: Box
) -> Expr:
    """The result of a function of single places, which may also read tensors of the outer graph."""
    module = gm.get_submodule(str(body.target))
    assert isinstance(module, fx.GraphModule)
    reads: Argument = node.args[place] if len(node.args) > place else ()
    like: Tensor = value(node.args[0])
    # Of one number, where flex gives them no axis: an index without axes would be read while the function is traced.
    scalars = [like.new_empty(1, dtype=None if e.sort is Sort.REAL else torch.int32) for e in given]
    inner = capture(module, [*scalars, *map(value, reads)])
    places = inner.graph.find_nodes(op="placeholder")
    seen = [outer.versions.read(read, node) for read in reads]
    known = [x for x in seen if x is not None]
    if len(known) < len(seen):
        raise OpaqueError  # somebody wrote through an alias
    inside = _Inside(inner, outer, dict(zip(places, (*given, *known), strict=True)))
    (result,) = inner.graph.output_node().all_input_nodes
    return inside.at(result, (const(0),) * result.meta["val"].ndim, facts)


class _Inside(SymbolicReader):
    """Reads the graph of a function; its tables are those of the outer graph."""

    def __init__(self, gm: fx.GraphModule, outer: SymbolicReader, given: Mapping[fx.Node, Expr | fx.Node]) -> None:
        super().__init__(gm)
        self._outer, self._given = outer, given

    def placeholder(self, node: fx.Node, index: Index, facts: Box) -> Expr:
        stands_for = self._given[node]
        return stands_for if isinstance(stands_for, Expr) else self._outer.at(stands_for, index, facts)

    def table(self, node: fx.Node, index: Index, by: fx.Node | None = None) -> Expr:
        raise OpaqueError  # a value of the function has no place in the outer graph
