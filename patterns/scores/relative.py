"""A learned bias by distance."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, Sort, h, k, k_len, q
from attn_compiler.algebra.expr import table as read
from attn_compiler.planning.words import Number, TableName


def relative(table: TableName, span: Number = k_len) -> Expr:
    """The entry q - k of a table [heads, 2 * span - 1], whose middle is distance 0."""
    return read(table, h, q - k + (span - 1), sort=Sort.REAL)
