"""The delta rule of Schlag et al. and DeltaNet: a key replaces what the state holds for it."""

from __future__ import annotations

from attn_compiler.algebra.expr import Sort, b, h, k, table
from attn_compiler.algebra.variant import Delta
from attn_compiler.planning.words import TableName


def delta(beta: TableName = "beta") -> Delta:
    """A key writes beta, from a table [batch, heads, tokens], of what its value differs by from what the state gives for it."""
    return Delta(table(beta, b, h, k, sort=Sort.REAL))
