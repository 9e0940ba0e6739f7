"""Tile by tile."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, const, k, minimum, where
from attn_compiler.planning.geometry import Geometry
from attn_compiler.planning.words import Count, PerToken


def tiles(*size: Count, geometry: Geometry) -> PerToken:
    """Tiles in row-major order, tokens in row-major order within; tiles at the far borders may be smaller."""
    sides = geometry.per_axis(size)
    rank, within, sizes = const(geometry.before), const(0), list(geometry.size)
    for axis, (at, side, length) in enumerate(zip(geometry.coordinates(k), sides, geometry.size, strict=True)):
        start = at // side * side
        sizes[axis] = minimum(length - start, side)
        rank = rank + _product(start, *sizes[:axis], *geometry.size[axis + 1 :])
        within = within * sizes[axis] + (at - start)
    return PerToken(where(geometry.inside(k), rank + within, k))


def _product(*factors: Expr) -> Expr:
    result = factors[0]
    for factor in factors[1:]:
        result = result * factor
    return result
