"""A state with learned gates, as in Lizard and gated linear attention."""

from __future__ import annotations

from typing import Literal

from attn_compiler.algebra.expr import Expr, Sort, b, exp, h, k, minimum, q, table
from attn_compiler.algebra.feature import component
from attn_compiler.algebra.variant import Gates
from attn_compiler.planning.words import TableName


def gate(how: Literal["scalar", "vector"], running: TableName = "gate") -> Expr | Gates:
    """The product of the gates between key and query; a table [batch, heads, tokens] holds their running logs, which never rise.

    With `vector` each feature has a gate of its own, as in GLA: [batch, heads, tokens, features]. A gate is at most 1. Nobody
    checks that: where logs rise, forms that go from token to token and those that take two tokens at once differ.
    """
    if how == "vector":
        return Gates(table(running, b, h, k, component, sort=Sort.REAL))
    at_query, at_key = (table(running, b, h, token, sort=Sort.REAL) for token in (q, k))
    return exp(minimum(at_query - at_key, 0.0))  # gates are at most 1; ahead of the query the sums say nothing
