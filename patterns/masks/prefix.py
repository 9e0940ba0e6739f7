"""A prefix that everybody sees, of another length in each row."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, b, k, table
from attn_compiler.planning.words import TableName


def prefix(name: TableName) -> Expr:
    """k < the row's entry of a run-time table."""
    return k < table(name, b)
