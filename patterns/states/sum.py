"""A state that forgets nothing."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, const


def sum() -> Expr:
    """What a key adds stays as it is."""
    return const(1.0)
