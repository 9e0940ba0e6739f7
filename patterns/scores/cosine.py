"""Cosine similarity."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, dot, k_norm, maximum, q_norm
from attn_compiler.planning.words import Number


def cosine(temperature: Number) -> Expr:
    """The cosine of q and k over the temperature."""
    return dot / maximum(q_norm * k_norm, 1e-12) / temperature
