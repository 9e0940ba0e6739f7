"""A Taylor series of exp."""

from __future__ import annotations

from attn_compiler.planning.words import Count, Declared


def taylor(order: Count = 2) -> Declared:
    """A Taylor series of exp."""
    return Declared("features", "taylor", (("order", order),))
