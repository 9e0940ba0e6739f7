"""The atom `none`."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, false


def none() -> Expr:
    """Never."""
    return false
