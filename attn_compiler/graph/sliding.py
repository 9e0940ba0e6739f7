"""Finds caches that slide: they let go of their oldest keys, so that a key's place there is no position."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from attn_compiler.graph.axes import rearranges, repeats, source
from attn_compiler.graph.calls import call, is_tensor, shape
from attn_compiler.graph.record import GraphSite


def slides(site: GraphSite) -> bool:
    """Whether the past and the new keys are kept, or read, without the first of them."""
    node, slices = site.k.node, list[fx.Node]()
    while is_tensor(node) and (_views(node) or call(node).op == "slice"):
        slices += [node] if call(node).op == "slice" else []
        node = source(node)
    read = call(node)
    if read.op != "cat" or len(read["tensors"]) != 2:
        return False
    dim, rank = read["dim"], len(shape(node))
    slices += _slices(node)
    return any(call(x)["dim"] % rank == dim % rank and call(x).get("start") not in (0, None) for x in slices)


def _slices(node: fx.Node) -> Iterator[fx.Node]:
    """The slices that are taken of a tensor, or of what only views it."""
    for user in node.users:
        if call(user).op == "slice":
            yield user
        elif is_tensor(user) and _views(user):
            yield from _slices(user)


def _views(node: fx.Node) -> bool:
    return rearranges(node) or repeats(node) or call(node).op in ("cast", "same", "decoded")
