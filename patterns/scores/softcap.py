"""Scores that cannot grow beyond a cap."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, tanh
from attn_compiler.planning.words import Number


def softcap(x: Number, cap: Number) -> Expr:
    """cap * tanh(x / cap)."""
    return tanh(x / cap) * cap
