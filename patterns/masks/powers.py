"""Blocks at distances that are powers of two (LogSparse)."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, either, k, q, same
from attn_compiler.planning.words import Count

LARGEST = 30  # no sequence is longer than 2**30 blocks


def powers(block: Count) -> Expr:
    """The distance in blocks is 0 or a power of two."""
    distance = abs(q // block - k // block)
    return either(same(distance, 0), *(same(distance, 2**n) for n in range(LARGEST + 1)))
