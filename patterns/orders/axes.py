"""The axes of the geometry in another order."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, k, where
from attn_compiler.errors import LanguageError
from attn_compiler.planning.geometry import Geometry
from attn_compiler.planning.words import PerToken


def axes(*order: int, geometry: Geometry) -> PerToken:
    """Row-major over the axes as they are listed."""
    if sorted(order) != list(range(len(geometry.size))):
        raise LanguageError(f"axes lists each of 0 … {len(geometry.size) - 1} once, not {order}")
    at = geometry.coordinates(k)
    rank: Expr = at[order[0]]
    for axis in order[1:]:
        rank = rank * geometry.size[axis] + at[axis]
    return PerToken(where(geometry.inside(k), rank + geometry.before, k))
