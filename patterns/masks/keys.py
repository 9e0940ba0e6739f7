"""Columns that everybody sees."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, k
from attn_compiler.planning.words import Tokens


def keys(set: Tokens) -> Expr:
    """k is in a role or a set of positions."""
    return set.at(k)
