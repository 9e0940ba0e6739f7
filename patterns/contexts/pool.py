"""Fewer keys and values, each the mean of some neighbors."""

from __future__ import annotations

from attn_compiler.algebra.context import Context
from attn_compiler.planning.geometry import Geometry
from attn_compiler.planning.words import CountPerAxis


def pool(size: CountPerAxis, *, geometry: Geometry | None = None) -> Context:
    """Keys and values are the means of `size` tokens each, or with a list of tiles of the geometry."""
    return Context("pool", tuple(size), () if len(size) == 1 else Geometry.plane(geometry, "pool"))
