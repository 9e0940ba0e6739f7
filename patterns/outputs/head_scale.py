"""A factor for each head, as in LoFiT, and the temperature of L2ViT."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, Sort, h, layer, table
from attn_compiler.algebra.output import x
from attn_compiler.planning.words import TableName


def head_scale(name: TableName = "head_scale") -> Expr:
    """The result times a factor from a table [layers, heads]."""
    return x * table(name, layer, h, sort=Sort.REAL)
