"""A ball on the geometry (CLEAR)."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, every, k, q
from attn_compiler.planning.geometry import Geometry
from attn_compiler.planning.words import Number


def ball(radius: Number, *, geometry: Geometry) -> Expr:
    """The squared distance on the geometry is less than radius squared."""
    differences = [x - y for x, y in zip(geometry.coordinates(q), geometry.coordinates(k), strict=True)]
    squared = differences[0] * differences[0]
    for difference in differences[1:]:
        squared = squared + difference * difference
    return every(geometry.inside(q), geometry.inside(k), squared < radius * radius)
