"""The sum of the weights, but never too little, as in L2ViT."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, acc, mass, maximum
from attn_compiler.planning.words import Number


def clamp(least: Number) -> Expr:
    """The sum of the weights, at least a number; no eps."""
    return acc / maximum(mass, least)
