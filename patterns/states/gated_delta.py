"""The delta rule on a state with a gate, as in Gated DeltaNet and InfiniteVL."""

from __future__ import annotations

from attn_compiler.algebra.expr import Sort, b, exp, h, k, minimum, q, table
from attn_compiler.algebra.variant import Delta
from attn_compiler.planning.words import TableName


def gated_delta(beta: TableName = "beta", running: TableName = "gate") -> Delta:
    """The state rule `delta` on a state that fades first, by a gate whose running logs are a table as those of `gate`."""
    at_query, at_key = (table(running, b, h, token, sort=Sort.REAL) for token in (q, k))
    return Delta(table(beta, b, h, k, sort=Sort.REAL), exp(minimum(at_query - at_key, 0.0)))
