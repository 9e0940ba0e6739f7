"""Every n-th key, counted from the query."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, k, q, same
from attn_compiler.planning.words import Count


def dilated(step: Count) -> Expr:
    """(q - k) % step == 0."""
    return same((q - k) % step, 0)
