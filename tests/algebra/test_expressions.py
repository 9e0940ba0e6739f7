"""Expressions are values with sorts: equality is theirs, truth is not."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from algebra.formulas import formulas
from attn_compiler.algebra.evaluate import evaluate_scalar
from attn_compiler.algebra.expr import Expr, Sort, apply, const, either, every, exp, false, k, q, same, symbol, table, true, where
from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.errors import AlgebraError, LanguageError

any_formula = st.sampled_from(list(Sort)).flatmap(lambda sort: formulas(sort, 3))
few = settings(max_examples=200)
x = symbol("x", Sort.REAL)


@pytest.mark.parametrize(
    "use", [lambda: bool(q < k), lambda: 0 <= q - k < 8, lambda: q < k and k < 9, lambda: not q, lambda: min(k, q)]
)
def test_an_expression_has_no_truth_value_and_says_what_to_write(use: Callable[[], object]) -> None:
    with pytest.raises(AlgebraError, match=r"\(a < b\) & \(b < c\)"):
        use()


@pytest.mark.parametrize(
    "build",
    [
        lambda: q & k,
        lambda: true + 1,
        lambda: ~q,
        lambda: (q < k) < k,
        lambda: where(q, 1, 2),
        lambda: where(q < k, true, 2),
        lambda: same(true, 1),
        lambda: exp(true),
        lambda: -false,
        lambda: apply("add", q),
        lambda: const(math.nan),
    ],
)
def test_sorts_and_arities_are_checked(build: Callable[[], Expr]) -> None:
    with pytest.raises(AlgebraError):
        build()


@pytest.mark.parametrize(
    ("e", "sort"),
    [
        (q + k, Sort.INDEX),
        (q + 1.0, Sort.REAL),
        (q / k, Sort.REAL),
        (q // k, Sort.INDEX),
        (q**2, Sort.REAL),
        (exp(q), Sort.REAL),
        (where(true, q, 1.0), Sort.REAL),
        (where(true, q < k, false), Sort.BOOL),
        (apply("floor", x), Sort.INDEX),
        (same(true, q < k), Sort.BOOL),
        (table("slope", q, sort=Sort.REAL), Sort.REAL),
    ],
    ids=str,
)
def test_the_sort_follows_from_the_operands(e: Expr, sort: Sort) -> None:
    assert e.sort is sort


def test_constants_of_other_sorts_are_other_constants() -> None:
    assert len({const(1), const(1.0), const(True)}) == 3


@few
@given(any_formula)
def test_a_copy_is_equal_and_hashes_the_same(e: Expr) -> None:
    copy = pickle.loads(pickle.dumps(e))
    assert copy == e
    assert hash(copy) == hash(e)


@few
@given(any_formula)
def test_a_walk_meets_every_part_once_and_operands_first(e: Expr) -> None:
    met: set[Expr] = set()
    for node in e.walk():
        assert node not in met
        assert met.issuperset(node.args)
        met.add(node)
    assert node == e


@few
@given(any_formula)
def test_replacing_nothing_changes_nothing(e: Expr) -> None:
    assert e.substitute({}) == e == e.transform(lambda node: node)


def test_every_and_either_of_nothing() -> None:
    assert every() == true
    assert either() == false
    assert every(q < k) == (q < k) == either(q < k)


_bounds = st.one_of(st.none(), st.integers(-12, 12))
_slices = st.builds(
    lambda start, stop, step: ":".join("" if n is None else str(n) for n in (start, stop, step)).removesuffix(":"),
    _bounds,
    _bounds,
    st.one_of(st.none(), st.integers(1, 4)),
).map(lambda text: text if ":" in text else text + ":")


def _python(text: str, length: int) -> set[int]:
    """What Python's own slices select."""
    found: set[int] = set()
    for part in text.split(", "):
        bounds = [int(n) if n else None for n in part.split(":")]
        found |= set(range(length)[slice(*bounds)]) if ":" in part else {int(part) % length}
    return found


@settings(max_examples=300)
@given(st.lists(_slices, min_size=1, max_size=3).map(", ".join), st.integers(1, 12))
def test_a_set_of_integers_selects_what_python_slices_select(text: str, length: int) -> None:
    assert IntegerSet.parse(text).members(length) == _python(text, length)


@settings(max_examples=300)
@given(st.lists(st.one_of(_slices, st.integers(-9, 9).map(str)), min_size=1, max_size=3).map(", ".join))
def test_a_set_of_integers_is_written_as_it_is_read(text: str) -> None:
    once = IntegerSet.parse(text)
    assert IntegerSet.parse(str(once)) == once


@settings(max_examples=300)
@given(st.lists(_slices, min_size=1, max_size=3).map(", ".join), st.integers(12, 20))
def test_the_condition_to_be_a_member_holds_for_members(text: str, length: int) -> None:
    chosen = IntegerSet.parse(text)
    condition = chosen.contains(q, length)
    found = {n for n in range(length) if evaluate_scalar(condition, {q: n})}
    assert found == chosen.members(length)


@pytest.mark.parametrize("text", ["", "a", "1-3", "0:4:0", "1,,2", "0:4:-1", "1.5", ":::"])
def test_what_is_no_set_of_integers_is_refused(text: str) -> None:
    with pytest.raises(LanguageError):
        IntegerSet.parse(text)


def test_an_integer_outside_is_refused() -> None:
    with pytest.raises(LanguageError, match="outside"):
        IntegerSet.parse("7").members(4)


def test_a_truth_value_is_no_set_of_integers() -> None:
    with pytest.raises(LanguageError):
        IntegerSet.parse(True)
