"""A state with a learned gate, as in Lizard and gated linear attention."""

from __future__ import annotations

from typing import Literal

from attn_compiler.algebra.expr import Expr, Sort, b, exp, h, k, minimum, q, table
from attn_compiler.planning.words import Declared, TableName


def gate(how: Literal["scalar", "vector"], running: TableName = "gate") -> Expr | Declared:
    """The product of the gates between key and query; a table [batch, heads, tokens] holds the running sums of their logs."""
    if how == "vector":
        return Declared("states", "gate", (("how", how),))
    at_query, at_key = (table(running, b, h, token, sort=Sort.REAL) for token in (q, k))
    return exp(minimum(at_query - at_key, 0.0))  # gates are at most 1; ahead of the query the sums say nothing
