"""InLine attention: weights are shifted, so that they sum to one and may be negative."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, acc, mass, seen, values


def subtract() -> Expr:
    """Weights (score - mean of scores + 1) / n over the n keys that are seen; no eps."""
    return acc / seen + (1.0 - mass / seen) * (values / seen)
