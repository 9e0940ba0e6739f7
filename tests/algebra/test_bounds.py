"""Bounds hold every value, and are tight where schedules need them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from algebra.formulas import Place, formulas, places, slacks
from algebra.rounding import strayed
from attn_compiler.algebra.bounds import ANY, EMPTY, Box, Interval, Occupancy, bounds, distance, occupancy
from attn_compiler.algebra.evaluate import evaluate_scalar
from attn_compiler.algebra.expr import Expr, Sort, b, const, every, false, k, maximum, minimum, q, same, sqrt, symbol, true, where
from attn_compiler.algebra.simplify import simplify

any_formula = st.sampled_from(list(Sort)).flatmap(formulas)
few = settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
TILE = {q: Interval(64, 127), k: Interval(0, 63)}
x, y = symbol("x", Sort.REAL), symbol("y", Sort.REAL)


@few
@given(any_formula, places, slacks)
def test_every_value_is_within_its_bounds(e: Expr, place: Place, slack: dict[Expr, tuple[int, int]]) -> None:
    lo, hi = bounds(e, place.box(slack))
    value, error = strayed(e, place)
    assert lo - error <= value <= hi + error


@few
@given(formulas(Sort.BOOL), places, slacks)
def test_an_occupancy_is_never_wrong(mask: Expr, place: Place, slack: dict[Expr, tuple[int, int]]) -> None:
    visible = bool(strayed(mask, place).value)
    assert occupancy(mask, place.box(slack)) in (Occupancy.MIXED, Occupancy.FULL if visible else Occupancy.EMPTY)


@few
@given(formulas(Sort.BOOL), places)
def test_a_visible_key_is_within_the_distance_of_its_mask(mask: Expr, place: Place) -> None:
    visible = bool(strayed(mask, place).value)
    for spelling in (mask, simplify(mask)):
        lo, hi = distance(spelling)
        assert not visible or lo <= place.env[q] - place.env[k] <= hi


@pytest.mark.parametrize(
    ("e", "box", "expected"),
    [
        (q - k, TILE, Interval(1, 127)),
        ((q + 5) - q, TILE, Interval(5, 5)),
        ((q - k) + k, TILE, Interval(64, 127)),
        (2 * (q - k) - q, TILE, Interval(64 - 126, 127)),
        (q % 64, TILE, Interval(0, 63)),
        (q % 128, TILE, Interval(64, 127)),
        (q % 48, TILE, Interval(0, 47)),
        (q // 64, TILE, Interval(1, 1)),
        (k // 16, TILE, Interval(0, 3)),
        ((q - 100) * (q - 100), TILE, Interval(0, 36 * 36)),
        (abs(q - 100), TILE, Interval(0, 36)),
        (minimum(q, 70), TILE, Interval(64, 70)),
        (maximum(k, 70), TILE, Interval(70, 70)),
        (where(k <= q, q, k), TILE, Interval(64, 127)),
        (same(q, k), TILE, Interval(0, 0)),
        ((k <= q) & (q - k < 128), TILE, Interval(1, 1)),
        ((k < q) | same(b, 3), TILE, Interval(1, 1)),
        (minimum(y, sqrt(x)), {y: Interval(5, 6)}, Interval(0, 6)),
        (q - k, {}, ANY),
    ],
    ids=str,
)
def test_bounds_are_as_tight_as_a_schedule_needs(e: Expr, box: Box, expected: Interval) -> None:
    assert bounds(e, box) == expected


@pytest.mark.parametrize(("exponent", "least", "greatest"), [(2, 0, 9), (3, -8, 27), (0, 1, 1)])
def test_a_power_with_a_whole_exponent_has_bounds(exponent: int, least: float, greatest: float) -> None:
    lo, hi = bounds(x**exponent, {x: Interval(-2, 3)})
    assert lo == pytest.approx(least)
    assert hi == pytest.approx(greatest)
    assert lo <= least
    assert hi >= greatest


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (true, ANY),
        (false, EMPTY),
        (k <= q, Interval(0, float("inf"))),
        ((k <= q) & (q - k < 256), Interval(0, 255)),
        ((k <= q) & (abs(q - k) < 256), Interval(0, 255)),
        (~(q < k) & ~(q - k >= 256), Interval(0, 255)),
        (same(k, q) | same(k, q - 3), Interval(0, 3)),
        ((2 * k <= 2 * q - 3) & (q <= k + 9), Interval(2, 9)),
        (k < 4, ANY),
    ],
    ids=str,
)
def test_the_distance_of_a_mask_is_known(mask: Expr, expected: Interval) -> None:
    assert distance(simplify(mask)) == expected


@pytest.mark.parametrize("window", [1, 5, 8])
def test_causal_windows_are_decided_tile_by_tile(window: int) -> None:
    mask, size = every(k <= q, q - k < window), 4
    for row, column in itertools.product(range(4), repeat=2):
        rows, columns = range(row * size, (row + 1) * size), range(column * size, (column + 1) * size)
        seen = {bool(evaluate_scalar(mask, {q: i, k: j})) for i in rows for j in columns}
        exact = Occupancy.MIXED if len(seen) == 2 else Occupancy.FULL if True in seen else Occupancy.EMPTY
        box = {q: Interval(rows[0], rows[-1]), k: Interval(columns[0], columns[-1])}
        assert occupancy(mask, box) is exact


def test_intervals_meet_and_join() -> None:
    assert Interval(0, 5) & Interval(3, 9) == Interval(3, 5)
    assert Interval(0, 1) | Interval(5, 9) == Interval(0, 9)
    assert (Interval(0, 1) & Interval(5, 9)).is_empty
    assert EMPTY | Interval(2, 3) == Interval(2, 3) == Interval(2, 3) | EMPTY


def test_a_constant_has_its_own_value_as_bounds() -> None:
    assert bounds(const(7)) == Interval(7, 7)
