"""A learned bias by logarithmic buckets of distance (T5)."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, Sort, floor, h, k, log, maximum, minimum, q, real, where
from attn_compiler.algebra.expr import table as read
from attn_compiler.planning.words import Count, TableName


def buckets(table: TableName, max_distance: Count, count: Count = 32, causal: bool = False) -> Expr:
    """The entry of the bucket of k - q in a table [heads, count]."""
    side = count if causal else count // 2
    distance = maximum(q - k, 0) if causal else abs(q - k)
    exact = side // 2
    ratio = log(real(maximum(distance, exact)) / exact) / log(max_distance / exact)
    far = minimum(exact + floor(ratio * (side - exact)), side - 1)
    bucket = where(distance < exact, distance, far)
    return read(table, h, bucket if causal else bucket + where(q < k, side, 0), sort=Sort.REAL)
