"""Attention with linear biases."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, const, h, heads, k, maximum, q, real, where
from attn_compiler.planning.words import Number


def alibi(slopes: Number | None = None) -> Expr:
    """-slope * |q - k|, with the slopes of the paper unless given."""
    return -(_standard() if slopes is None else slopes) * real(abs(q - k))


def _standard() -> Expr:
    """2 ** (-8 (h + 1) / heads); beyond the largest power of two, every second slope of twice as many heads."""
    power: Expr = const(1)
    for n in range(1, 13):
        power = maximum(power, where(heads >= 2**n, 2**n, 1))
    exponent = where(h < power, -8 * (h + 1) / power, -4 * (2 * (h - power) + 1) / power)
    return const(2.0) ** exponent
