"""Nobody sees the future."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, k, q


def causal(offset: int = 0) -> Expr:
    """k <= q + offset."""
    return k <= (q + offset if offset else q)
