"""A state that fades with distance, as in RetNet, TransNormer and Lightning Attention."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, exp, k, q, real
from attn_compiler.planning.words import Number


def decay(slopes: Number) -> Expr:
    """exp(-slope * |q - k|)."""
    return exp(-slopes * real(abs(q - k)))
