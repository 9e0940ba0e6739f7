"""Random calls of attention: variants drawn from everything the algebra can say, over shapes with their edge cases."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.algebra.variant import SOFTMAX, EmptyRows, Normalizer, Variant
from attn_compiler.testing.case import Case


def random_case(seed: int) -> Case:
    """A variant drawn from everything the algebra can say, over shapes with their edge cases."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, kv_heads, ratio = draw.choice((1, 2)), draw.choice((1, 2)), draw.choice((1, 2, 3))
    heads, k_len = kv_heads * ratio, draw.choice((0, 1, 2, 7, 31, 67, 70, 97))
    q_len = draw.choice((k_len, k_len, 1, max(0, k_len // 2), 5))
    dim, value_dim = draw.choice((4, 8, 16)), draw.choice((4, 8, 16))
    shapes = ((batch, heads, q_len, dim), (batch, kv_heads, k_len, dim), (batch, kv_heads, k_len, value_dim))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    tables = {
        "slopes": torch.rand(heads, generator=generator, dtype=torch.float64),
        "bias": torch.randn(1, heads, max(1, q_len), max(1, k_len), generator=generator, dtype=torch.float64),
        "relative": torch.randn(heads, 9, generator=generator, dtype=torch.float64),
        "sinks": torch.randn(heads, generator=generator, dtype=torch.float64),
        "padding": torch.rand(batch, max(1, k_len), generator=generator) < 0.8,
        "documents": torch.randint(0, 3, (batch, k_len + 3), generator=generator).sort(dim=-1).values,
        "prefixes": torch.randint(0, 6, (batch,), generator=generator),
    }
    variant = _random_variant(draw)
    if heads > 1 and draw.random() < 0.3:
        own = replace(_random_variant(draw), dropout=0.0)
        variant = replace(variant, groups=((IntegerSet.parse(draw.choice(("0", "0::2", "-1"))), own),))
    read = variant.tables()
    position = draw.choice((None, None, None, 0, 3, torch.arange(q_len) * 2 if q_len != batch else None))
    return Case(variant, q, k, v, {name: t for name, t in tables.items() if name in read}, position)


def _random_variant(draw: random.Random) -> Variant:
    return Variant(
        mask=_random_mask(draw, depth=2),
        empty_rows=draw.choice([EmptyRows.ZERO, EmptyRows.MEAN, EmptyRows.UNMASKED]),  # NaN has no budget
        scale=draw.choice((Variant().scale, Variant().scale, e.const(0.3), e.table("slopes", e.h, sort=Sort.REAL))),
        score=_random_score(draw),
        normalizer=_random_normalizer(draw),
    )


def _random_mask(draw: random.Random, depth: int) -> Expr:
    left, right = draw.randint(1, 9), draw.randint(1, 9)
    if depth and draw.random() < 0.5:
        a, b = _random_mask(draw, depth - 1), _random_mask(draw, depth - 1)
        return draw.choice((a & b, a & b, a | b, a & ~b))
    return draw.choice(
        (
            e.true,
            e.k <= e.q,
            e.k <= e.q,
            (e.q - e.k < left) & (e.k - e.q < right),
            (e.k <= e.q) & (e.q - e.k < left),
            (e.k <= e.q) & ((e.q - e.k < left) | (e.k < right)),
            e.k < left,
            e.same((e.q - e.k) % left, 0),
            e.same(e.q // left, e.k // left),
            e.k < e.table("prefixes", e.b),
            e.table("padding", e.b, e.k, sort=Sort.BOOL),
            e.same(e.table("documents", e.b, e.q), e.table("documents", e.b, e.k)),
            e.same((e.k // right + e.kv) % 2, 0),
            e.real(e.q - e.k) < e.table("slopes", e.h, sort=Sort.REAL) * 20.0,
        )
    )


def _random_score(draw: random.Random) -> Expr:
    distance = e.real(e.q - e.k)
    return draw.choice(
        (
            e.score,
            e.score,
            e.score + e.table("bias", e.b, e.h, e.i, e.k, sort=Sort.REAL),
            e.score - e.table("slopes", e.h, sort=Sort.REAL) * abs(distance),
            e.score + e.table("relative", e.h, e.q - e.k + 4, sort=Sort.REAL),
            e.tanh(e.score / 5.0) * 5.0,
            e.dot / (e.q_norm * e.k_norm + 0.1) * 3.0,
        )
    )


def _random_normalizer(draw: random.Random) -> Normalizer:
    sink = e.mass + e.exp(e.table("sinks", e.h, sort=Sort.REAL) - e.peak)
    return draw.choice(
        (
            SOFTMAX,
            SOFTMAX,
            SOFTMAX,
            Normalizer("softmax_one", weight=e.exp(e.score - e.peak), output=e.acc / (e.mass + e.exp(-e.peak))),
            Normalizer("sink", weight=e.exp(e.score - e.peak), output=e.acc / sink),
            Normalizer("sigmoid", weight=e.sigmoid(e.score - 1.0), output=e.acc),
            Normalizer("relu", weight=e.maximum(e.score, 0.0), output=e.acc / e.maximum(e.real(e.k_len), 1.0)),
        )
    )
