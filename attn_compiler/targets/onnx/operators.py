"""Which variants the attention operators of ONNX and of onnxruntime compute, and why not the others."""

from __future__ import annotations

import math

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr
from attn_compiler.algebra.simplify import simplify
from attn_compiler.algebra.storage import Held, Shared
from attn_compiler.algebra.variant import SOFTMAX, Variant
from attn_compiler.planning.site import Site
from attn_compiler.targets.exported import Spec
from attn_compiler.targets.linear import linear
from attn_compiler.targets.onnx.codes import TYPES
from attn_compiler.targets.operands import PLACE
from attn_compiler.targets.reach import is_causal, sides

ATTENTION_SINCE = 23  # the opset that brought ONNX's Attention
_PRODUCTS = (e.dot, e.q_norm, e.k_norm)


def scaled_ahead(variant: Variant) -> bool:
    """Whether q can be multiplied with the scale before it meets any key."""
    return not variant.score.mentions(*_PRODUCTS) and not variant.scale.mentions(e.i, PLACE, *_PRODUCTS)


def not_attention(spec: Spec, variant: Variant, opset: int) -> str | None:
    """Why ONNX's Attention does not compute a variant; None if it does."""
    if opset < ATTENTION_SINCE:
        return f"opset {opset} has no Attention"
    if spec.dtype == "float64":
        return "onnxruntime's Attention does not compute in float64"
    if variant.normalizer != SOFTMAX:
        return f"ONNX's Attention knows softmax; found {variant.normalizer.name}"
    if not variant.feature.is_identity:
        return "ONNX's Attention is given q and k, not features of them"
    if not scaled_ahead(spec.in_places(variant)) or added(variant.score) is None:
        return "ONNX's Attention adds to scores, and changes them in no other way"
    return None


def added(score: Expr) -> Expr | None:
    """What a score adds to the product of q and k; None where it does something else."""
    if score == e.score:
        return e.const(0.0)
    if score.op != "add":
        return None
    sums = [x for x in score.args if x.mentions(e.score)]
    rests = [x for x in score.args if not x.mentions(e.score)]
    rest = added(sums[0]) if len(sums) == 1 else None
    return None if rest is None else rest + rests[0]


def not_contrib(spec: Spec, variant: Variant) -> str | None:
    """Why neither GroupQueryAttention nor LinearAttention computes a variant; None if one does."""
    if spec.dtype == "float64":
        return "onnxruntime's own operators do not compute in float64"
    return _not_linear(spec, variant) if linear(variant) else _not_group_query(spec, variant)


def _not_linear(spec: Spec, variant: Variant) -> str | None:
    found = linear(variant)
    aligned = spec.first is not None and spec.position == e.i and spec.q_len == spec.k_len
    if found is None or not aligned or found.behind is None or found.behind < 0:
        return "LinearAttention's queries see the keys up to their own"
    return "LinearAttention's keys fade until the query that sees them" if found.fades is not None and found.behind else None


def _not_group_query(spec: Spec, variant: Variant) -> str | None:
    if variant.normalizer != SOFTMAX or variant.score != e.score or not variant.feature.is_identity:
        return "GroupQueryAttention computes a softmax of scaled products, and nothing else"
    if spec.q_len != spec.k_len or spec.position != e.i:
        return "GroupQueryAttention reads several tokens behind others for one row alone"
    if latest(spec.in_positions(variant.mask)) is None:
        return "GroupQueryAttention's masks are causal, with a window or none"
    if spec.dim != spec.value_dim:
        return f"GroupQueryAttention's keys and values are of one size; found {spec.dim} and {spec.value_dim}"
    if spec.dim % 8 or not scaled_ahead(spec.in_places(variant)):
        return f"GroupQueryAttention's heads are of a multiple of 8, under one scale; found {spec.dim}"
    return None


def not_coded(site: Site, variant: Variant) -> str | None:
    """Why GroupQueryAttention does not read the cache that a variant wants held in few bits; None if it does."""
    held = {part.storage.kv_cache for part in variant.parts()}
    how = next(iter(held))
    if len(held) > 1 or how is None or how != Held(how.numbers, Shared("channel")) or how.numbers.name not in TYPES:
        return "onnxruntime's caches are `{type: int8, per: channel}`, or int4"
    if site.dtype != "float32" or site.head_dim != site.value_dim or site.head_dim % 8:
        return "onnxruntime's caches in codes are of float32, of keys and values of one size, a multiple of 8"
    if len(variant.parts()) > 1 or variant.normalizer != SOFTMAX or variant.score != e.score or not variant.feature.is_identity:
        return "onnxruntime attends to a cache in codes by a softmax of scaled products, and nothing else"
    if variant.scale.mentions(e.q, e.k, e.k_len) or latest(variant.mask) is None:
        return "onnxruntime attends to a cache in codes under a causal mask, with a window or none"
    return None


def latest(mask: Expr) -> int | None:
    """How many keys a causal mask shows, a query's own included; -1 for all, None for another mask."""
    mask = simplify(mask)
    if is_causal(mask):
        return -1
    reach = sides(mask)
    if reach.nearest != 0 or reach.prefix or not math.isfinite(reach.farthest):
        return None
    keys = int(reach.farthest) + 1
    same = e.apply("le", e.k, e.q) & e.apply("lt", e.q - e.k, keys)
    return keys if simplify(same) == mask else None
