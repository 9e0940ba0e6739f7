"""Feature maps as ONNX nodes: the same operands with q and k mapped, and a variant that has no map any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from attn_compiler.algebra import expr as e
from attn_compiler.algebra import feature as f
from attn_compiler.algebra.expr import Expr
from attn_compiler.algebra.feature import IDENTITY
from attn_compiler.algebra.variant import Variant
from attn_compiler.targets.onnx.formula import Block
from attn_compiler.targets.onnx.nodes import Value
from attn_compiler.targets.onnx.scope import Scope
from attn_compiler.targets.operands import kv_owners


def mapped(scope: Scope, block: Block, variant: Variant) -> tuple[Block, Variant]:
    """The operands of some heads where q and k are features."""
    feature = variant.feature
    if feature.is_identity:
        return block, variant
    if any(part.weights is not None and part.weights.mentions(e.h) for part in feature.of_k):
        block = by_query_heads(scope, block)
    ratio = scope.spec.heads // scope.spec.kv_heads
    shared = block.kv_heads < len(scope.heads)
    owners = kv_owners(scope.heads, ratio) if shared else [head // ratio for head in scope.heads]
    of_keys: Mapping[Expr, Value] = {e.kv: scope.nodes.constant([[[owner]] for owner in owners], "int64")}
    q, k = _mapped(scope, block.q, feature.of_q, {}), _mapped(scope, block.k, feature.of_k, of_keys)
    return replace(block, q=q, k=k), replace(variant, feature=IDENTITY)


def by_query_heads(scope: Scope, block: Block) -> Block:
    """The same operands, keys and values once for each query head."""
    k, v = (by_heads(scope, x, block.kv_heads) for x in (block.k, block.v))
    return Block(block.q, k, v, len(scope.heads))


def by_heads(scope: Scope, x: ir.Value, kv_heads: int) -> ir.Value:
    """What heads share, once for each of them."""
    heads = len(scope.heads)
    owners = [head * kv_heads // heads for head in range(heads)]
    return x if heads == kv_heads else scope.nodes.op("Gather", x, scope.nodes.constant(owners, "int64"), axis=1)


def _mapped(scope: Scope, x: ir.Value, blocks: Sequence[f.Block], known: Mapping[Expr, Value]) -> ir.Value:
    parts = [_block(scope, x, block, known) for block in blocks]
    return scope.nodes.op("Concat", *parts, axis=-1) if len(parts) > 1 else parts[0] if parts else x


def _block(scope: Scope, x: ir.Value, block: f.Block, known: Mapping[Expr, Value]) -> ir.Value:
    nodes = scope.nodes
    numbers = x if block.weights is None else nodes.op("MatMul", x, _weights(scope, block.weights, known))
    numbers = _power(scope, numbers, block.power)
    at: dict[Expr, Value] = {**known, f.x: numbers}
    if block.each.mentions(f.norm):
        at[f.norm] = nodes.op("ReduceL2", x, nodes.vector(-1), keepdims=1)
    each = scope.scores.real_tensor(block.each, at)
    if not block.each.mentions(f.x):
        each = nodes.op("Expand", each, nodes.op("Shape", numbers))
    return nodes.op("Softmax", each, axis=-1) if block.softmax else each


def _weights(scope: Scope, weights: Expr, known: Mapping[Expr, Value]) -> ir.Value:
    """A map of each head, [heads, components, features]."""
    features = scope.spec.table(str(weights.value)).shape[-1]
    places: dict[Expr, Value] = {
        f.component: scope.nodes.constant([[n] for n in range(scope.spec.dim)], "int64"),
        f.feature: scope.nodes.range(0, features if isinstance(features, int) else 0),
    }
    return scope.scores.real_tensor(weights, {**known, **places})


def _power(scope: Scope, x: ir.Value, power: int) -> ir.Value:
    """All products of so many components."""
    nodes = scope.nodes
    if power == 0:
        return nodes.slice(x, 3, 0, 1)
    products = x
    for _ in range(power - 1):
        outer = nodes.op("Mul", nodes.op("Unsqueeze", products, nodes.vector(-1)), nodes.op("Unsqueeze", x, nodes.vector(-2)))
        products = nodes.reshape(outer, 0, 0, 0, -1)
    return products
