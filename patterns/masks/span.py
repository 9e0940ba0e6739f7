"""A window of each head that grows with the length (MoA)."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, ceil, k, k_len, q, real
from attn_compiler.planning.words import Count, Number


def span(alpha: Number, beta: Number, round: Count = 1) -> Expr:
    """q - k < round * ceil((alpha + beta * k_len) / round), with numbers or per-head tables."""
    return q - k < ceil((real(alpha) + beta * real(k_len)) / round) * round
