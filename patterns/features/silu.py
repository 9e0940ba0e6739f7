"""The activation of Lightning Attention and TransNormer."""

from __future__ import annotations

from attn_compiler.algebra.expr import sigmoid
from attn_compiler.algebra.feature import Block, Feature, of_both, x


def silu() -> Feature:
    """x * sigmoid(x)."""
    return of_both("silu", Block(x * sigmoid(x)))
