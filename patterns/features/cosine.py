"""Unit vectors: scores are cosines."""

from __future__ import annotations

from attn_compiler.algebra.expr import maximum
from attn_compiler.algebra.feature import Block, Feature, norm, of_both, x


def cosine() -> Feature:
    """x over its length."""
    return of_both("cosine", Block(x / maximum(norm, 1e-12)))
