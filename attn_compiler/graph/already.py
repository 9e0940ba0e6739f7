"""Recognizes attentions that are linear already: keys and values are one product, which queries meet in a second one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from attn_compiler import torch_private as private
from attn_compiler.graph.axes import rearranges, source
from attn_compiler.graph.calls import call, equal, is_number, is_tensor, shape
from attn_compiler.graph.contraction import Contraction, Side, contraction

REASON = (
    "it is linear already: keys are summed up before a query meets them, so its time grows with the length and not with its "
    "square; its two products stay as they are"
)
_POSITIVE = ("relu", "elu", "exp", "sigmoid", "silu", "softplus", "softmax")  # maps of single tokens


@dataclass(frozen=True)
class Already:
    """The product in which queries meet what keys and values left, and the maps of queries and keys."""

    node: fx.Node
    maps: tuple[fx.Node, ...]


def already_linear(node: fx.Node) -> Already | None:
    """q' · (k'ᵀ · v), where k' is a softmax over the tokens, or q' and k' are what the same positive map makes of q and k."""
    outer = contraction(node)
    return None if outer is None else next(_found(outer), None)


def _found(outer: Contraction) -> Iterator[Already]:
    for state, queries in ((outer.left, outer.right), (outer.right, outer.left)):
        at = _through(state.node)
        inner = contraction(at)
        if inner is None or len(inner.out) != len(state.labels) or len(inner.summed) != 1:
            continue
        asked = [own for own, label in zip(inner.out, state.labels, strict=True) if label in outer.summed]
        for keys, values in ((inner.left, inner.right), (inner.right, inner.left)):
            if len(asked) != 1 or asked[0] not in inner.free(keys) or not outer.free(queries):
                continue
            if any(private.is_parameter(_through(side.node)) for side in (queries, keys, values)):
                continue
            maps = _maps(queries, keys, inner)
            if maps:
                yield Already(outer.node, maps)


def _maps(queries: Side, keys: Side, inner: Contraction) -> tuple[fx.Node, ...]:
    """The maps that make weights of products: none where these are no attention."""
    of_q, of_k = _map(queries.node), _map(keys.node)
    if of_k is None:
        return ()
    tokens = shape(keys.node)[keys.labels.index(inner.summed[0])]
    read = call(of_k)
    if read.op == "softmax" and equal(shape(of_k)[read["dim"]], tokens):
        return (of_k,) if of_q is None else (of_q, of_k)
    return () if of_q is None or call(of_q).op != read.op else (of_q, of_k)


def _map(node: fx.Node) -> fx.Node | None:
    """The map whose result a factor is, perhaps with a number added (elu + 1)."""
    node = _through(node)
    if call(node).op == "add" and is_number(node.args[1]):
        node = _through(source(node))
    return node if call(node).op in _POSITIVE else None


def _through(node: fx.Node) -> fx.Node:
    """Where numbers come from that were laid out otherwise, or multiplied with one number."""
    while node.op == "call_function" and node.args and is_tensor(node.args[0]) and _is_passed(node):
        node = source(node)
    return node


def _is_passed(node: fx.Node) -> bool:
    read = call(node)
    scaled = read.op in ("mul", "div") and is_number(node.args[1])
    return rearranges(node) or scaled or read.op in ("cast", "same")
