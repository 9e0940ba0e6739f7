"""The atom `all`."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, true


def all() -> Expr:
    """Always."""
    return true
