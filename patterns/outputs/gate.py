"""A gate on the result, as in InfiniteVL and Lightning Attention."""

from __future__ import annotations

from typing import Literal

from attn_compiler.algebra.expr import Expr, Sort, b, h, i, sigmoid, table
from attn_compiler.algebra.output import component, x
from attn_compiler.planning.words import TableName


def gate(how: Literal["sigmoid", "silu"], name: TableName = "output_gate") -> Expr:
    """The result times `sigmoid` or `silu` of what a table [batch, heads, queries, dim] holds."""
    opened = table(name, b, h, i, component, sort=Sort.REAL)
    return x * (sigmoid(opened) if how == "sigmoid" else opened * sigmoid(opened))
