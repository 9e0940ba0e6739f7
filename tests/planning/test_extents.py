"""Extents hold every value of a formula: the law of `algebra.bounds`, for the analysis over arrays of boxes."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from algebra.formulas import Place, formulas, places, slacks
from algebra.rounding import strayed
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.planning.extents import Extent, extent
from attn_compiler.planning.table_values import TableValues

any_formula = st.sampled_from(list(Sort)).flatmap(formulas)
few = settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def boxes(place: Place, slack: dict[Expr, tuple[int, int]], shifts: list[int]) -> dict[Expr, Extent]:
    """The box around a place, beside boxes that are elsewhere."""
    at = np.array([0, *shifts], float)
    return {leaf: Extent(box.lo + at, box.hi + at) for leaf, box in place.box(slack).items()}


@few
@given(any_formula, places, slacks, st.lists(st.integers(-9, 9), max_size=2), st.booleans())
def test_every_value_is_within_its_extent(
    e: Expr, place: Place, slack: dict[Expr, tuple[int, int]], shifts: list[int], known: bool
) -> None:
    tables = {name: TableValues(rows) for name, rows in place.tables.items()} if known else {}
    found = extent(e, boxes(place, slack, shifts), tables)
    lo, hi = (np.ravel(end)[0] for end in (found.lo, found.hi))
    value, error = strayed(e, place)
    assert float(lo) - error <= value <= float(hi) + error
