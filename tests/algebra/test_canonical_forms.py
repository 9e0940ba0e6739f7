"""What means the same compares equal, and what does not, does not."""

from __future__ import annotations

import pytest

from attn_compiler.algebra.bounds import Box, Interval
from attn_compiler.algebra.expr import (
    Expr,
    Sort,
    apply,
    ceil,
    const,
    every,
    exp,
    false,
    floor,
    h,
    k,
    log,
    maximum,
    minimum,
    q,
    real,
    same,
    score,
    sigmoid,
    symbol,
    table,
    tanh,
    true,
    where,
)
from attn_compiler.algebra.simplify import conjuncts, disjuncts, implied, simplify

one, two, three = (table(name, k, sort=Sort.BOOL) for name in ("one", "two", "three"))
x, y = symbol("x", Sort.REAL), symbol("y", Sort.REAL)

EQUAL_MASKS = [
    (abs(q - k) < 8, (q - k < 8) & (k - q < 8)),
    (abs(q - k) < 8, abs(k - q) <= 7),
    (abs(q - k) < 8, (k > q - 8) & (q > k - 8)),
    (~(k > q), k <= q),
    (~(k <= q), q < k),
    (k <= q, q - k >= 0),
    (k <= q, k < q + 1),
    (k <= q, 2 * k <= 2 * q + 1),
    (k <= q, real(k) <= real(q)),
    (k <= q, (k < q) | (k <= q)),
    (q - k < 2.5, q - k <= 2),
    (every(k <= q, q - k < 4, q - k < 9), every(q - k < 4, q >= k)),
    ((q - k < 4) | (q - k < 9), q - k < 9),
    ((k <= 2) & (k >= 5), false),
    ((k <= 5) | (k >= 2), true),
    ((k <= q) & (k > q), false),
    (same(q, k), same(k, q)),
    (same(q - k, 0), same(2 * k, 2 * q)),
    (same(2 * q, 2 * k + 1), false),
    (same(q // 8, k // 8), same((k // 8) * 3, (q // 8) * 3)),
    (same((q + 16) // 8, (k + 16) // 8), same(q // 8, k // 8)),
    (same(q // 4 // 2, k // 4 // 2), same(q // 8, k // 8)),
    (same((q + 32) % 8, 3), same(q % 8, 3)),
    (same(q % 16 % 8, 3), same(q % 8, 3)),
    (same((8 * q + k) % 8, 1), same(k % 8, 1)),
    (minimum(q, 9) >= k, (k <= q) & (k <= 9)),
    (maximum(q, 9) >= k, (k <= q) | (k <= 9)),
    (minimum(q, 9) <= k, (k >= q) | (k >= 9)),
    (~(one & two), ~one | ~two),
    (~(one | two), ~two & ~one),
    (~~one, one),
    (one & one, one),
    (one & (one | two), one),
    (one | (one & two), one),
    (one & (~one | two), two & one),
    (one & two & (~one | ~two), false),
    (one | two | (~one & ~two), true),
    (one & (~one | (two & three)), one & two & three),
    (one | ~one, true),
    (one & true, one),
    (one & false, false),
    (where(one, two, three), (one & two) | (~one & three)),
    (where(one, true, two), one | two),
    (where(one, two, two), two),
    (where(true, one, two), one),
    (same(one, two), where(one, two, ~two)),
    (where(one, 1, 0) > 0, one),
    (same(where(one, 1, 0), 0), ~one),
    (where(one, 0.0, -1.0) < 0.0, ~one),
]
EQUAL_NUMBERS = [
    (q + k + 1, 1 + k + q),
    ((q + 5) - q, const(5)),
    (2 * (q + k) - q, q + 2 * k),
    (q * k * h, h * (k * q)),
    ((q - k) * (q - k), (k - q) * (k - q)),
    (q * (2 * k), 2 * (k * q)),
    (abs(q - k), abs(k - q)),
    (minimum(q, k), minimum(k, q)),
    (minimum(q, q + 1), q),
    (maximum(q, q - 3), q),
    ((8 * q + 3) // 8, q),
    ((q + 8) // 8, q // 8 + 1),
    (q % 1, const(0)),
    (q // 1, q),
    (floor(real(q)), q),
    (ceil(q), q),
    (where(~one, q, k), where(one, k, q)),
    (where(k > q, q, k), where(k <= q, k, q)),
    (x + y, y + x),
    (x * y * 2.0, 2.0 * (y * x)),
    (x * 1, x),
    (x + 0, x),
    (x * 0, const(0.0)),
    (x - x, const(0.0)),
    (x + x, 2 * x),
    (0 - (0 - x), x),
    (apply("neg", -x), x),
    (log(exp(q)), real(q)),
    (x + q, real(q) + x),
    (0.0 - q, -real(q)),
    (x - y, -y + x),
    (-(x - y), y - x),
    (x / 2, x * 0.5),
    (x**1, x),
    (log(exp(x)), x),
    (exp(x) * y / exp(x), y),
    (real(3) * x, 3.0 * x),
    (minimum(x, y), minimum(y, x)),
    (30.0 * tanh(score / 30.0), tanh(score / 30.0) * 30.0),
    (2.0 * sigmoid(x + y) * y, y * sigmoid(y + x) * 2.0),
    (const(1.0) / const(4.0) * x, x / 4.0),
    (where(true, q, x), real(q)),
]
DIFFERENT = [
    (k <= q, k < q),
    (one & two, one | two),
    ((q <= k) & (k <= q), false),
    ((q <= 5) & (q >= 5), false),
    ((q < k) | (k < q), true),
    (q // 8, q // 4),
    (q // 2 * 2, q),
    (q % 8 % 3, q % 3),
    (same(q // 8, k // 8), same(q % 8, k % 8)),
    (q - k, k - q),
    (x - y, y - x),
    (x / y * y, x),  # y may be zero
    (where(one, q, k), where(one, k, q)),
    (x * x, x),
]
UNDER_FACTS: list[tuple[Expr, Box, Expr]] = [
    (k >= 0, {k: Interval(0, 99)}, true),
    (k > q, {k: Interval(0, 3), q: Interval(5, 9)}, false),
    ((k <= q) & (k >= 0), {k: Interval(0, 99)}, k <= q),
    (abs(q), {q: Interval(0, 9)}, q),
    (abs(q), {q: Interval(-9, 0)}, -q),
    (q % 16, {q: Interval(0, 15)}, q),
    (q // 16, {q: Interval(0, 15)}, const(0)),
    ((16 * q + k) // 16, {k: Interval(0, 15)}, q),
    ((16 * q + k) % 16, {k: Interval(0, 15)}, k),
    (minimum(q, 16), {q: Interval(0, 15)}, q),
    (h * q, {h: Interval(0, 0)}, const(0)),
    (where(h < 4, q, k), {h: Interval(0, 3)}, q),
]


@pytest.mark.parametrize(("a", "b"), EQUAL_MASKS + EQUAL_NUMBERS, ids=str)
def test_what_means_the_same_compares_equal(a: Expr, b: Expr) -> None:
    assert simplify(a) == simplify(b)


@pytest.mark.parametrize(("a", "b"), DIFFERENT, ids=str)
def test_what_differs_stays_different(a: Expr, b: Expr) -> None:
    assert simplify(a) != simplify(b)


@pytest.mark.parametrize(("e", "facts", "expected"), UNDER_FACTS, ids=str)
def test_facts_decide_what_they_can(e: Expr, facts: Box, expected: Expr) -> None:
    assert simplify(e, facts) == simplify(expected)
    assert simplify(e) != simplify(expected)


@pytest.mark.parametrize("e", [const(1.0) / const(0.0), log(const(-1.0)), const(-8.0) ** 0.5, const(1) // const(0)], ids=str)
def test_what_has_no_value_is_left_alone(e: Expr) -> None:
    assert simplify(e) == e


def test_conjuncts_and_disjuncts_take_a_mask_apart() -> None:
    assert conjuncts(one & two & three) == disjuncts(one | two | three) == (one, two, three)
    assert conjuncts(one | two) == (one | two,)
    assert conjuncts(true) == disjuncts(false) == ()


def test_a_narrow_window_implies_a_wide_one() -> None:
    assert implied(abs(q - k) < 4, abs(q - k) < 9)
    assert implied((k <= q) & one, k <= q)
    assert not implied(k <= q, k < q)


def test_a_hundred_alternatives_are_one_chain() -> None:
    members = [same(table("document", k), 2 * n) for n in range(100)]
    forwards, backwards = false, false
    for member in members:
        forwards, backwards = forwards | member, member | backwards
    assert simplify(forwards) == simplify(backwards)
    assert {node for node in simplify(forwards).walk() if node.op == "eq"} == {simplify(member) for member in members}


def test_alternating_depth_costs_no_more_than_its_size() -> None:
    e: Expr = one
    for n in range(8):  # each negation used to negate all below it again
        e = (e | (q < n)) & (e | (k < n))
    assert simplify(e).sort is Sort.BOOL
