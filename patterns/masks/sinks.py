"""The first tokens, which everybody sees."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, k
from attn_compiler.planning.words import Count


def sinks(n: Count) -> Expr:
    """k < n."""
    return k < n
