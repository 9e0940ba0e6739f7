"""A mask in another order of the tokens."""

from __future__ import annotations

from attn_compiler.algebra.expr import k, q
from attn_compiler.planning.words import Order, Seen


def permuted(mask: Seen, order: Order) -> Seen:
    """The mask holds after the order."""
    moved = {q: order.at(q), k: order.at(k)}
    keep, phantoms, times = (part.substitute(moved) for part in (mask.keep, mask.phantoms, mask.times))
    return Seen(keep, phantoms, times, (*mask.derived, *order.derived))
