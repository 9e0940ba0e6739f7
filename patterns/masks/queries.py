"""Rows that see everything."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, q
from attn_compiler.planning.words import Tokens


def queries(set: Tokens) -> Expr:
    """q is in a role or a set of positions."""
    return set.at(q)
