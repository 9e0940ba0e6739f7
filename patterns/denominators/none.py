"""Nothing divides, as in Lightning Attention."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, acc


def none() -> Expr:
    """Nothing divides."""
    return acc
