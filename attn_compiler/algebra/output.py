"""What becomes of the result of an attention, number by number: each step is an expression over `x`, one number of it."""

from __future__ import annotations

from attn_compiler.algebra.expr import Sort, symbol
from attn_compiler.algebra.feature import component, x

# The mean of the squares of a result's components. Steps may also speak of b, h, i, layer and `component`.
mean_square = symbol("mean_square", Sort.REAL)

__all__ = ["component", "mean_square", "x"]
