"""Formulas are written as people write them."""

from __future__ import annotations

import pytest

from attn_compiler.algebra.expr import (
    Expr,
    Sort,
    b,
    ceil,
    const,
    exp,
    k,
    mass,
    q,
    real,
    same,
    score,
    sqrt,
    symbol,
    table,
    true,
    where,
)
from attn_compiler.algebra.notation import notation, text

x = symbol("x", Sort.REAL)
one = table("one", k, sort=Sort.BOOL)


@pytest.mark.parametrize(
    ("e", "written"),
    [
        (k <= q, "k ≤ q"),
        (q - k < 256, "q − k < 256"),
        (q - (k - 1), "q − (k − 1)"),
        (q - k - 1, "q − k − 1"),
        (q + (k + 1), "q + k + 1"),
        ((q + k) * 2, "(q + k)·2"),
        (q + k * 2, "q + k·2"),
        (x / (x * 2.0), "x / (x·2)"),
        (-(x + 1.0), "−(x + 1)"),
        ((x + 1.0) ** 2, "(x + 1)^2"),
        ((k <= q) & (q - k < 8) | one, "k ≤ q ∧ q − k < 8 ∨ one[k]"),
        ((k <= q) & ((q - k < 8) | one), "k ≤ q ∧ (q − k < 8 ∨ one[k])"),
        (~one, "¬one[k]"),
        (~((k <= q) | one), "¬(k ≤ q ∨ one[k])"),
        (same(q, k), "q = k"),
        (~same(q, k), "q ≠ k"),
        (same(q // 64, k // 64), "⌊q / 64⌋ = ⌊k / 64⌋"),
        ((q + 1) // 64, "⌊(q + 1) / 64⌋"),
        (q % 8, "q mod 8"),
        (q % 8 * 7, "(q mod 8)·7"),
        (q * 7 % 8, "(q·7) mod 8"),
        (q % 8 + 1, "q mod 8 + 1"),
        (abs(q - k), "|q − k|"),
        (sqrt(x), "√x"),
        (sqrt(x + 1.0), "√(x + 1)"),
        (ceil(x), "⌈x⌉"),
        (exp(score) / mass, "exp(score) / mass"),
        (table("document", b, k), "document[b, k]"),
        (real(q) * 0.5, "q·0.5"),
        (where(one, x, 0.0), "x if one[k] else 0"),
        (true, "everywhere"),
        (~true, "¬everywhere"),
        (const(float("-inf")), "−∞"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_formula_is_written_with_as_few_parentheses_as_can_be(e: Expr, written: str) -> None:
    assert notation(e) == written


@pytest.mark.parametrize(
    ("e", "written"),
    [
        (q - k < 256, "lt(sub(q, k), 256)"),
        (const(0.1) * x, "mul(0.1, x)"),
        (const(1) * x, "mul(1, x)"),
        (const(1.0) * x, "mul(1.0, x)"),
        (table("document", b, k), "table('document', 'index', b, k)"),
        (true, "True"),
    ],
    ids=str,
)
def test_the_canonical_text_tells_all_apart(e: Expr, written: str) -> None:
    assert text(e) == written
