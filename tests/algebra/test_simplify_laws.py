"""Laws of canonical forms, over random formulas."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from algebra.formulas import Place, formulas, places, slacks
from algebra.rounding import agree
from attn_compiler.algebra.expr import Expr, Sort, apply
from attn_compiler.algebra.simplify import simplify

any_formula = st.sampled_from(list(Sort)).flatmap(formulas)
few = settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


@few
@given(any_formula, places)
def test_a_canonical_form_means_the_same(e: Expr, place: Place) -> None:
    assert agree(e, simplify(e), place)


@few
@given(any_formula, places, slacks)
def test_facts_change_nothing_where_they_hold(e: Expr, place: Place, slack: dict[Expr, tuple[int, int]]) -> None:
    assert agree(e, simplify(e, place.box(slack)), place)


@few
@given(any_formula)
def test_a_canonical_form_is_its_own(e: Expr) -> None:
    once = simplify(e)
    assert simplify(once) == once


@few
@given(any_formula)
def test_a_canonical_form_keeps_the_sort(e: Expr) -> None:
    assert simplify(e).sort is e.sort


@few
@pytest.mark.parametrize(
    ("op", "sort"), [("and", Sort.BOOL), ("or", Sort.BOOL), ("add", Sort.INDEX), ("mul", Sort.INDEX), ("min", Sort.INDEX)]
)
@given(data=st.data())
def test_the_order_of_operands_does_not_matter(op: str, sort: Sort, data: st.DataObject) -> None:
    a, b, c = (data.draw(formulas(sort, 2)) for _ in range(3))
    assert simplify(apply(op, a, b)) == simplify(apply(op, b, a))
    if op != "min":
        assert simplify(apply(op, apply(op, a, b), c)) == simplify(apply(op, a, apply(op, b, c)))
