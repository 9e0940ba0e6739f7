"""Diagonals (slashes)."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, k, q
from attn_compiler.algebra.integers import IntegerSet


def offsets(set: IntegerSet) -> Expr:
    """q - k is in the set, where a negative number means itself."""
    return set.contains_signed(q - k)
