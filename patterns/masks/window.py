"""A band around the diagonal."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, k, q
from attn_compiler.planning.words import Count, Units


def window(left: Count, right: Count | None = None, of: Units | None = None) -> Expr:
    """q - left < k < q + right, where right is left unless given; distances are in tokens, blocks or labels."""
    here, there = (of.at(q), of.at(k)) if of else (q, k)
    return (here - left < there) & (there < here + (right or left))
