"""Scores that fall with distance."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, k, q, real
from attn_compiler.planning.words import Number


def decay(slopes: Number) -> Expr:
    """-slope * |q - k|."""
    return -slopes * real(abs(q - k))
