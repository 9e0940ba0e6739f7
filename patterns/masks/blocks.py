"""A bitmap of blocks, perhaps one for each head."""

from __future__ import annotations

from attn_compiler.algebra.expr import Sort, h, k, q, table
from attn_compiler.planning.words import Count, Order, Seen, TableName


def blocks(name: TableName, size: Count, *, order: Order | None = None) -> Seen:
    """The bitmap has the block, where blocks are cut in the slot `order`."""
    row, column = (order.at(q), order.at(k)) if order else (q, k)
    keep = table(name, h, row // size, column // size, sort=Sort.BOOL)
    return Seen(keep, derived=order.derived if order else ())
