"""Pieces of the token axis, or of each axis of a geometry, that see only themselves (Swin)."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, every, k, q, same
from attn_compiler.errors import LanguageError
from attn_compiler.planning.geometry import Geometry
from attn_compiler.planning.words import CountPerAxis, PerAxis


def chunks(size: CountPerAxis, shift: PerAxis = (0,), *, geometry: Geometry | None = None) -> Expr:
    """(q - shift) // size == (k - shift) // size, on the token axis, or with lists on each axis of the geometry."""
    if max(len(size), len(shift)) == 1:
        return same((q - shift[0]) // size[0], (k - shift[0]) // size[0])
    if geometry is None:
        raise LanguageError("`chunks` with a list speaks of a geometry; set the slot `geometry`")
    sizes, shifts = geometry.per_axis(size), geometry.per_axis(shift)
    axes = zip(geometry.coordinates(q), geometry.coordinates(k), sizes, shifts, strict=True)
    return every(geometry.inside(q), geometry.inside(k), *(same((x - s) // n, (y - s) // n) for x, y, n, s in axes))
