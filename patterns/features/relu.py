"""Rectified queries and keys."""

from __future__ import annotations

from attn_compiler.algebra.expr import maximum
from attn_compiler.algebra.feature import Block, Feature, of_both, x


def relu() -> Feature:
    """max(x, 0)."""
    return of_both("relu", Block(maximum(x, 0.0)))
