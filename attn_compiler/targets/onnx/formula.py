"""The formula of attention as ONNX nodes: some queries meet some keys; heads that share keys and values do so without copies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.variant import SOFTMAX, EmptyRows, Variant
from attn_compiler.targets.onnx.faded import one_by_one
from attn_compiler.targets.onnx.nodes import DTYPES, Nodes, Value
from attn_compiler.targets.onnx.operators import scaled_ahead
from attn_compiler.targets.onnx.scope import Scope
from attn_compiler.targets.reach import Sides


@dataclass(frozen=True)
class Block:
    """Queries [batch, heads, queries, dim], the keys and values that they meet, and how often heads share these."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    kv_heads: int


@dataclass(frozen=True)
class Group:
    """Some heads of a call, which compute one variant, its positions spelled out.

    `empty` is what a query gets that sees no key; None where every query is known to see one. `sides` are how far the mask
    reaches from a query's position, which is `first` for the first of them; None where positions do not follow each other.
    Only keys whose distance is a multiple of `step` are seen.
    """

    scope: Scope
    block: Block
    variant: Variant
    empty: ir.Value | None
    sides: Sides
    first: Expr | None
    step: int


def attend(group: Group) -> ir.Value:
    """The output for the queries of a block; q holds the scale already where `scaled_ahead` says so."""
    scope, block, variant, empty = group.scope, group.block, group.variant, group.empty
    scores = _scores(scope, block, variant)
    visible = scope.masks.read(variant.mask)
    if visible is False:  # everywhere, which is no reason to take it for a mask that hides nothing
        visible = scope.nodes.constant([[[[False]]]], "bool")
    holes = may_be_infinite(variant.score)
    if variant.empty_rows is EmptyRows.UNMASKED and isinstance(visible, ir.Value) and empty is not None:
        visible, empty = _unmasked(scope.nodes, visible), None
    if variant.normalizer == SOFTMAX:
        return _softmax(scope, block, scores, visible, empty, holes=holes)
    return _general(scope, block, variant, scores, visible, empty)


def _scores(scope: Scope, block: Block, variant: Variant) -> ir.Value:
    nodes = scope.nodes
    axes = scope.axes[e.b]
    if variant.gates is not None:
        products = one_by_one(scope, block.q, block.k, variant.gates)
    else:
        products = grouped(scope, block.q, nodes.turned(block.k, axes), block.kv_heads)
    if not variant.score.mentions(e.score, e.dot):  # what does not ask q and k has an axis only where it changes
        return nodes.op("Expand", scope.scores.real_tensor(variant.score), nodes.op("Shape", products))
    if scaled_ahead(variant):
        return scope.scores.real_tensor(variant.score, {e.score: products})
    known: dict[Expr, Value] = {e.dot: products}
    computed = variant.score.substitute({e.score: e.dot * variant.scale})
    if computed.mentions(e.q_norm):
        known[e.q_norm] = nodes.op("ReduceL2", block.q, nodes.vector(-1), keepdims=1)
    if computed.mentions(e.k_norm):
        norms = nodes.turned(nodes.op("ReduceL2", block.k, nodes.vector(-1), keepdims=1), axes)
        ratio = len(scope.heads) // block.kv_heads
        owners = [owner for owner in range(block.kv_heads) for _ in range(ratio)]
        known[e.k_norm] = nodes.op("Gather", norms, nodes.constant(owners, "int64"), axis=1)
    return scope.scores.real_tensor(computed, known)


def grouped(scope: Scope, left: ir.Value, right: ir.Value, kv_heads: int) -> ir.Value:
    """`left @ right`, where several heads of `left` share one of `right`: their rows stand below each other.

    Where blocks stand between heads and rows, heads that share one follow each other instead.
    """
    nodes, heads = scope.nodes, len(scope.heads)
    if heads == kv_heads:
        return nodes.op("MatMul", left, right)
    rows = scope.queries.count
    times = heads // kv_heads
    if scope.blocks is not None:
        apart = nodes.reshape(left, 0, kv_heads, times, scope.blocks, rows, -1)
        products = nodes.op("MatMul", apart, nodes.op("Unsqueeze", right, nodes.vector(2)))
        return nodes.reshape(products, 0, heads, scope.blocks, rows, -1)
    below = rows * times if isinstance(rows, int) else nodes.op("Mul", nodes.index(rows), nodes.index(times))
    folded = nodes.reshape(left, 0, kv_heads, below, -1)
    return nodes.reshape(nodes.op("MatMul", folded, right), 0, heads, rows, -1)


def may_be_infinite(score: Expr) -> bool:
    """Whether a score may be -inf although its key is visible: a bias given as a tensor may hide keys."""
    return any(node.op == "table" and node.sort is Sort.REAL for node in score.walk())


def _unmasked(nodes: Nodes, visible: ir.Value) -> ir.Value:
    """A row that sees nothing sees everything."""
    return nodes.op("Or", visible, nodes.op("Not", _any(nodes, visible)))


def _any(nodes: Nodes, visible: ir.Value) -> ir.Value:
    counted = nodes.op("Cast", visible, to=int(ir.DataType.INT32))
    most = nodes.op("ReduceMax", counted, nodes.vector(-1), keepdims=1)
    return nodes.op("Cast", most, to=int(ir.DataType.BOOL))


def _softmax(scope: Scope, block: Block, scores: ir.Value, visible: Value, empty: ir.Value | None, *, holes: bool) -> ir.Value:
    """onnxruntime has one kernel for softmax; what is hidden gets a score so low that its weight is zero."""
    nodes = scope.nodes
    lowest = nodes.constant(np.finfo(scope.real).min, scope.real)
    if isinstance(visible, ir.Value):
        hidden = nodes.op("Where", visible, nodes.constant(0, scope.real), lowest)
        scores = nodes.op("Add", scores, hidden)
    if holes:
        scores = nodes.op("Max", scores, lowest)
    out = grouped(scope, nodes.op("Softmax", scores, axis=-1), block.v, block.kv_heads)
    if empty is None or not (holes or isinstance(visible, ir.Value)):
        return out
    if holes:
        sees = nodes.op("Greater", nodes.op("ReduceMax", scores, nodes.vector(-1), keepdims=1), lowest)
    else:
        assert isinstance(visible, ir.Value)
        sees = _any(nodes, visible)
    return nodes.op("Where", sees, out, empty)


def _general(scope: Scope, block: Block, variant: Variant, scores: ir.Value, visible: Value, empty: ir.Value | None) -> ir.Value:
    """Weights and output as the normalizer says."""
    nodes, normalizer, real = scope.nodes, variant.normalizer, scope.real
    zero, infinite = nodes.constant(0, real), nodes.constant(-np.inf, real)
    seen = nodes.op("Greater", scores, infinite)
    seen = nodes.op("And", seen, visible) if isinstance(visible, ir.Value) else seen
    known: dict[Expr, Value] = {}
    if normalizer.tracks_peak or normalizer.output.mentions(e.peak):
        peak = nodes.op("ReduceMax", nodes.op("Where", seen, scores, infinite), nodes.vector(-1), keepdims=1)
        known[e.peak] = nodes.op("Where", nodes.op("Greater", peak, infinite), peak, zero)
    shown = nodes.op("Where", seen, scores, known.get(e.peak, zero))  # type: ignore[arg-type]
    weights = scope.scores.real_tensor(normalizer.weight, {**known, e.score: shown})
    weights = nodes.op("Where", seen, weights, zero)
    sees = _any(nodes, seen)
    mass = nodes.op("Where", sees, nodes.op("ReduceSum", weights, nodes.vector(-1), keepdims=1), nodes.constant(1, real))
    total = grouped(scope, weights, block.v, block.kv_heads)
    if normalizer.counts:
        ones = nodes.op("Cast", nodes.op("Expand", seen, nodes.op("Shape", weights)), to=int(DTYPES[real]))
        count = nodes.op("ReduceSum", ones, nodes.vector(-1), keepdims=1)
        known |= {
            e.seen: nodes.op("Max", count, nodes.constant(1, real)),
            e.values: grouped(scope, ones, block.v, block.kv_heads),
        }
    out = scope.scores.real_tensor(normalizer.output, {**known, e.mass: mass, e.acc: total})
    return out if empty is None else nodes.op("Where", sees, out, empty)
