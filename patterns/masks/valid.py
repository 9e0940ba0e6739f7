"""Padding is seen by nobody."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, Sort, b, k, table
from attn_compiler.planning.words import TableName


def valid(name: TableName) -> Expr:
    """k is not padding, says a run-time bool table."""
    return table(name, b, k, sort=Sort.BOOL)
