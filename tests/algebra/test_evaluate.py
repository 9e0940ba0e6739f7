"""Evaluation means what Python means, and tables are read as they are documented to be."""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from algebra.formulas import Place, formulas, places
from algebra.rounding import strayed
from attn_compiler.algebra.evaluate import PYTHON, Scalar, Table, evaluate, evaluate_scalar
from attn_compiler.algebra.expr import OPERATIONS, Expr, Sort, b, const, exp, k, q, sigmoid, symbol, table
from attn_compiler.algebra.notation import text
from attn_compiler.errors import TableError

any_formula = st.sampled_from(list(Sort)).flatmap(formulas)
few = settings(max_examples=200)
ROWS: Mapping[str, Table] = {"row": [[1, 2, 3], [4, 5, 6]], "one": [7], "number": lambda *at: sum(at)}


def _python(e: Expr, place: Place) -> Scalar:
    """What Python makes of the canonical text."""
    source = re.sub(r"\b(and|or|not)\(", r"\1_(", text(e))
    names: dict[str, object] = {op + "_" * keyword.iskeyword(op): function for op, function in PYTHON.items()}
    names |= {str(leaf.value): value for leaf, value in place.env.items()}
    names["table"] = lambda name, _, *at: evaluate_scalar(table(name, *at), {}, place.tables)
    return eval(source, names)  # type: ignore[no-any-return]


@few
@given(any_formula, places)
def test_the_canonical_text_says_what_is_evaluated(e: Expr, place: Place) -> None:
    assert evaluate_scalar(e, place.env, place.tables) == _python(e, place)


@few
@given(any_formula, any_formula)
def test_equal_texts_are_equal_expressions(a: Expr, other: Expr) -> None:
    assert (text(a) == text(other)) == (a == other)


@few
@given(any_formula, places)
def test_the_value_has_the_sort_of_the_formula(e: Expr, place: Place) -> None:
    value = evaluate_scalar(e, place.env, place.tables)
    assert isinstance(value, {Sort.BOOL: bool, Sort.INDEX: int, Sort.REAL: int | float}[e.sort])
    assert value == strayed(e, place).value


def test_every_operation_has_a_meaning() -> None:
    assert set(PYTHON) == set(OPERATIONS)


@pytest.mark.parametrize(("a", "n"), [(7, 4), (-7, 4), (7, -4), (-8, 4)])
def test_division_of_indices_rounds_down(a: int, n: int) -> None:
    env = {q: a, k: n}
    assert evaluate_scalar(q // k, env) == math.floor(a / n)
    assert evaluate_scalar(q % k, env) == a - n * math.floor(a / n)


@pytest.mark.parametrize("x", [-1000.0, -1.0, 0.0, 1.0, 1000.0])
def test_the_sigmoid_does_not_overflow(x: float) -> None:
    value, opposite = (evaluate_scalar(sigmoid(z), {}) for z in (x, -x))
    assert 0 <= value <= 1
    assert value + opposite == pytest.approx(1, abs=4 * 2**-52)


def test_an_exponential_that_overflows_is_infinite() -> None:
    assert evaluate_scalar(exp(const(1e6)), {}) == math.inf


@pytest.mark.parametrize(
    ("e", "expected"),
    [
        (table("row", b, k), 6),
        (table("row", q, b, k), 6),
        (table("row", b, -3), 4),
        (table("row", 9, 9), 6),
        (table("one", b, k), 7),
        (table("number", b, k), 3),
    ],
    ids=str,
)
def test_a_table_is_read_at_its_last_coordinates_and_at_the_border(e: Expr, expected: int) -> None:
    assert evaluate_scalar(e, {b: 1, q: 5, k: 2}, ROWS) == expected


def test_a_missing_table_is_named() -> None:
    with pytest.raises(TableError, match='"absent" is missing; given: number, one, row'):
        evaluate_scalar(table("absent", k), {k: 0}, ROWS)


def test_a_shared_part_is_evaluated_once() -> None:
    met: list[str] = []
    x = symbol("x", Sort.INDEX)
    e = x
    for _ in range(50):
        e = e + e

    def count(a: int, other: int) -> int:
        met.append("add")
        return a + other

    assert evaluate(e, lambda node, at: 1, {"add": count}) == 2**50
    assert len(met) == 50
