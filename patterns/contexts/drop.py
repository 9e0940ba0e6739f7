"""Keys and values that are left out: pruned tokens."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, Sort, b, k, table
from attn_compiler.planning.words import TableName


def drop(name: TableName) -> Expr:
    """No query sees the keys of which a run-time bool table [batch, tokens] says so."""
    return ~table(name, b, k, sort=Sort.BOOL)
