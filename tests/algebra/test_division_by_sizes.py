"""Places that are counted through an axis and taken apart again, where the axis has a size that is only known when running."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from attn_compiler.algebra.bounds import Box, Interval
from attn_compiler.algebra.evaluate import evaluate_scalar
from attn_compiler.algebra.expr import Expr, Sort, i, k, q_len, symbol, table
from attn_compiler.algebra.simplify import simplify

n, m = q_len, symbol("m", Sort.INDEX)
BELOW: Box = {i: Interval(0, math.inf), k: Interval(0, math.inf), simplify(n - k): Interval(1, math.inf)}


def test_counted_places_are_found_again() -> None:
    assert simplify((i * n + k) // n, BELOW) == i
    assert simplify((i * n + k) % n, BELOW) == k
    assert simplify((n + k) // n, BELOW).value == 1
    assert simplify((i * n * m + m * n + k) // n, BELOW) == simplify(i * m + m)


def test_what_may_reach_the_size_is_left_alone() -> None:
    for facts in ({}, {k: Interval(0, math.inf)}, {simplify(n - k): Interval(1, math.inf)}, {simplify(n - k): Interval(0, 9)}):
        assert simplify((i * n + k) // n, facts).op == "floordiv"
        assert simplify((i * n + k) % n, facts).op == "mod"
    assert simplify((i * n + k + 1) % n, BELOW).op == "mod"
    assert simplify((i * table("n") + k) % table("n"), BELOW).op == "mod"


def _sums(depth: int = 3) -> st.SearchStrategy[Expr]:
    leaves = st.sampled_from([i, k, m, n, i * n, k * n, m * n, n * n, k * m])
    return st.lists(st.tuples(leaves, st.integers(-2, 2)), min_size=1, max_size=depth).map(
        lambda terms: sum((leaf * by for leaf, by in terms[1:]), terms[0][0] * terms[0][1])
    )


@given(_sums(), st.integers(1, 7), st.integers(0, 9), st.integers(0, 6), st.integers(0, 5), st.sampled_from(["//", "%"]))
def test_a_division_keeps_its_value(total: Expr, size: int, row: int, place: int, other: int, op: str) -> None:
    e = total // n if op == "//" else total % n
    at = {n: size, i: row, k: place % size, m: other}
    assert evaluate_scalar(simplify(e, BELOW), at) == evaluate_scalar(e, at)
