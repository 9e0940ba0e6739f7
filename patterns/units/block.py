"""Distances in blocks."""

from __future__ import annotations

from attn_compiler.algebra.expr import k
from attn_compiler.planning.words import Count, PerToken


def block(size: Count) -> PerToken:
    """The number of a token's block."""
    return PerToken(k // size)
