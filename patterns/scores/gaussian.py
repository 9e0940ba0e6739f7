"""A bell around the query."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, k, q, real
from attn_compiler.planning.words import Number


def gaussian(sigma: Number) -> Expr:
    """-(q - k)**2 / (2 * sigma**2)."""
    distance = real(q - k)
    return -(distance * distance) / (2.0 * sigma * sigma)
