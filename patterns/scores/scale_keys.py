"""More attention for some keys, in proportion to their score (PAI)."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, k, score, where
from attn_compiler.planning.words import Number, Tokens


def scale_keys(set: Tokens, factor: Number) -> Expr:
    """(factor - 1) * |score|, for keys in the set: a term to add to the score."""
    return where(set.at(k), (factor - 1) * abs(score), 0.0)
