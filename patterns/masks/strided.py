"""Every n-th block of keys, counted from the start, other ones for each head (S2-Attention)."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, k, kv, same
from attn_compiler.planning.words import Count


def strided(block: Count, step: Count, head_step: int = 0, offset: int = 0) -> Expr:
    """(k // block + kv * head_step + offset) % step == 0, kv the kv head."""
    return same((k // block + kv * head_step + offset) % step, 0)
