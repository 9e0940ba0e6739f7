"""Any mask at all, as a run-time table."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, Sort, b, h, k, q, table
from attn_compiler.planning.words import TableName


def pairs(name: TableName) -> Expr:
    """A run-time bool table [q, k] says so: exact, never fast by itself."""
    return table(name, b, h, q, k, sort=Sort.BOOL)
