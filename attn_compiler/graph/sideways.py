"""Turns every softmax over another axis than the last: Inductor, up to torch 2.13 at least, takes it for one over the last."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import cast

import torch
from torch import fx

from attn_compiler.graph.bind import Anchor
from attn_compiler.graph.calls import Argument, call, shape
from attn_compiler.graph.chain import Walk
from attn_compiler.graph.match import anchor_of
from attn_compiler.graph.mutation import Versions

_TRANSPOSE = torch.ops.aten.transpose.int


def turn_softmaxes(graph: fx.Graph, but: Collection[fx.Node], also: Collection[fx.Node]) -> bool:
    """Compute every softmax between two products along the last axis, but those anchored in `but`; whether there was any.

    Inductor's patterns of attention do not look at the axis: they fuse `softmax(q · k, dim=-2) · v` as if it were -1.
    Transposing is free: Inductor writes a softmax out as loops, which run along any axis. Those in `also` run along the last
    axis, and are turned for the same reason: Inductor must not fuse them.
    """
    sideways = list(_sideways(graph, but, also))
    for anchor in sideways:
        _turn(graph, anchor)
    return bool(sideways)


def _sideways(graph: fx.Graph, but: Collection[fx.Node], also: Collection[fx.Node]) -> Iterator[Anchor]:
    versions = Versions(graph)
    for node in graph.nodes:
        anchor = anchor_of(node, versions) if node.op == "call_function" and node not in but else None
        if anchor is None or anchor.mass is not None or call(anchor.node).op == "log_softmax":
            continue
        rank = len(shape(anchor.score))
        last = anchor.dim % rank == rank - 1 and node not in also
        if rank < 2 or last or any(call(x).writes for x in (anchor.node, anchor.weights)):
            continue
        walk = Walk(versions, anchor.dim % rank - rank)
        if any(walk.backwards(anchor.score, anchor.node)) and any(walk.forwards(anchor.weights)):
            yield anchor


def _turn(graph: fx.Graph, anchor: Anchor) -> None:
    weights, rank = anchor.weights, len(shape(anchor.score))
    axis = anchor.dim % rank
    along, turned_axis = ((axis, rank - 1), -1) if axis != rank - 1 else ((rank - 2, rank - 1), -2)

    def made(operator: object, *args: Argument, **kwargs: Argument) -> fx.Node:
        node = graph.call_function(operator, args, kwargs)  # type: ignore[arg-type]
        node.meta = {key: value for key, value in weights.meta.items() if key != "val"}
        return node

    with graph.inserting_before(weights):
        score = made(_TRANSPOSE, anchor.score, *along)
        if call(anchor.node).op == "softmax":
            turned = made(anchor.node.target, score, turned_axis, *anchor.node.args[2:], **anchor.node.kwargs)
            back = made(torch.ops.aten.contiguous.default, made(_TRANSPOSE, turned, *along))
        else:
            turned = made(anchor.node.target, score)
            mass = made(torch.ops.aten.sum.dim_IntList, turned, [turned_axis], True)
            back = made(_TRANSPOSE, made(torch.ops.aten.div.Tensor, turned, mass), *along)
    back.meta["val"] = cast(object, weights.meta["val"])
    weights.replace_all_uses_with(back)
