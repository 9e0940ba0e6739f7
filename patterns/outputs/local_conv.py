"""Neighbors' values beside the result: InLine's local residual, the convolution of Agent Attention, LEPE."""

from __future__ import annotations

from attn_compiler.algebra.expr import Sort, b, h, layer, table
from attn_compiler.algebra.output import Local, component, tap
from attn_compiler.errors import LanguageError
from attn_compiler.planning.geometry import Geometry
from attn_compiler.planning.words import Count, TableName


def local_conv(
    size: Count,
    weights: TableName = "local_conv",
    bias: TableName | None = None,
    centered: bool = False,
    per_row: bool = False,
    *,
    geometry: Geometry | None = None,
) -> Local:
    """Adds v of near tokens that a query sees, by a table [layers, heads, dim, taps]: up to itself, around it, or on the grid.

    `bias` names a table [layers, heads, dim]. With `per_row` the tables of a call are [batch, heads, dim, …], as those that
    InLine makes of its mean token.
    """
    first = b if per_row else layer
    added = None if bias is None else table(bias, first, h, component, sort=Sort.REAL)
    taps = table(weights, first, h, component, tap, sort=Sort.REAL)
    if geometry is None:
        return Local((size,), taps, added, centered=centered)
    if geometry.sides is None:
        raise LanguageError("`local_conv` needs a `geometry` whose sizes are numbers")
    return Local((size,) * len(geometry.sides), taps, added, geometry.sides, geometry.before)
