"""More attention for some keys."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, k, where
from attn_compiler.planning.words import Number, Tokens


def add_keys(set: Tokens, amount: Number) -> Expr:
    """The amount, for keys in the set."""
    return where(set.at(k), amount, 0.0)
