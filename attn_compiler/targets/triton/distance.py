"""Tables that are read by how far a query is ahead of a key: tiles that are equally far apart share their gradients."""

from __future__ import annotations

import math

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.bounds import Box, Interval, distance
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.simplify import simplify
from attn_compiler.algebra.variant import EmptyRows, Variant
from attn_compiler.targets.cpp.spec import FIRST_KEY, FIRST_QUERY, LONGEST
from attn_compiler.targets.operands import PLACE

DISTANCE = e.symbol("distance", Sort.INDEX)
DISTANCES: Box = {DISTANCE: Interval(-3 * LONGEST, 3 * LONGEST)}


def by_distance(read: Expr) -> Expr | None:
    """A reading of a table with the distance in the place of two tokens; None where it depends on more than that."""
    query = PLACE + FIRST_KEY + DISTANCE - FIRST_QUERY
    found = read.transform(lambda node: query if node == e.i else _whole(node))
    return found if found.mentions(DISTANCE) and not found.mentions(PLACE) else None


def _whole(node: Expr) -> Expr:
    """The canonical form of what is computed without rounding; real numbers stay those of the forward kernel."""
    return node if any(part.sort is Sort.REAL for part in node.walk()) else simplify(node)


def leads(variant: Variant, lengths: tuple[int, int], firsts: tuple[int, int] | None, size: int) -> range:
    """By how many tiles queries may be ahead of keys that they see; `firsts` are the first positions, if tokens are counted."""
    q_len, k_len = lengths
    reach = distance(variant.mask) if firsts and variant.empty_rows is not EmptyRows.UNMASKED else Interval(-math.inf, math.inf)
    shift = firsts[1] - firsts[0] if firsts else 0
    least, most = max(reach.lo + shift, 1 - k_len), min(reach.hi + shift, q_len - 1)
    return range(0) if least > most else range(math.floor(least / size), math.ceil(most / size) + 1)
