"""Symbolic derivatives agree with automatic ones."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from torch import Tensor

from algebra.formulas import Place, formulas, places, x, y
from algebra.rounding import strayed
from attn_compiler.algebra.derivative import derivative
from attn_compiler.algebra.evaluate import evaluate, evaluate_scalar, read
from attn_compiler.algebra.expr import (
    Expr,
    Sort,
    const,
    exp,
    log,
    maximum,
    minimum,
    peak,
    q,
    score,
    sigmoid,
    sqrt,
    tanh,
    where,
)
from attn_compiler.algebra.simplify import simplify
from attn_compiler.errors import AlgebraError

TORCH: Mapping[str, Callable[..., Tensor]] = {
    **{op: getattr(operator, op) for op in ("add", "sub", "mul", "neg", "abs", "lt", "le", "eq", "floordiv", "mod", "pow")},
    **{op: getattr(torch, op) for op in ("exp", "log", "sqrt", "tanh", "sigmoid", "floor", "ceil", "where")},
    "min": torch.minimum,
    "max": torch.maximum,
    "div": operator.truediv,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "not": torch.logical_not,
    "real": lambda a: a,
}
SMOOTH = [
    x * y + x / (1.0 + y * y),
    x**3,
    exp(x) ** y,
    log(1.0 + x * x) * sqrt(1.0 + exp(y)),
    sigmoid(x * y) - x * sigmoid(x),
    30.0 * tanh(x / 30.0),
    minimum(x, y) * maximum(x, 0.5),
    abs(x - y),
    where(x < y, x * x, exp(-x)),
    x + x * q,
    -(x - 2.0 * x * x) / (3.0 - tanh(y)),
]


def _automatic(e: Expr, leaf: Expr, place: Place) -> float:
    variable = torch.tensor(float(place.env[leaf]), dtype=torch.float64, requires_grad=True)

    def value(node: Expr, at: tuple[Tensor, ...]) -> Tensor:
        if node == leaf:
            return variable
        if node.op == "table":
            found = read(str(node.value), place.tables, [int(i) for i in at])
        else:
            found = place.env[node] if node.op == "symbol" else node.value  # type: ignore[assignment]
        return torch.tensor(found, dtype=torch.bool if node.sort is Sort.BOOL else torch.float64)

    result = evaluate(e, value, TORCH)
    if not result.requires_grad:
        return 0.0
    (slope,) = torch.autograd.grad(result, variable, allow_unused=True)
    return 0.0 if slope is None else float(slope)


@pytest.mark.parametrize("leaf", [x, y], ids=str)
@pytest.mark.parametrize("e", SMOOTH, ids=str)
@settings(max_examples=25)
@given(place=places)
def test_the_derivative_is_that_of_autograd(e: Expr, leaf: Expr, place: Place) -> None:
    if place.env[x] in (place.env[y], 0.5):  # a kink, where both sides are right
        reject()
    slope = derivative(e, leaf)
    value, error = strayed(slope, place)
    parts = (abs(float(evaluate_scalar(part, place.env))) for formula in (e, slope) for part in formula.walk())
    assert abs(value - _automatic(e, leaf, place)) <= 2 * error + 4 * sys.float_info.epsilon * max(parts)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(formulas(Sort.REAL, 3), places)
def test_a_formula_without_the_leaf_has_no_slope(e: Expr, place: Place) -> None:
    assert derivative(e, peak) == const(0.0)


@pytest.mark.parametrize(
    ("e", "at_zero"),
    [(abs(x), 1.0), (minimum(x, -x), 1.0), (maximum(x, -x), 1.0), (where(x < 0, -x, x), 1.0)],
    ids=str,
)
def test_at_a_kink_the_first_side_counts(e: Expr, at_zero: float) -> None:
    assert evaluate_scalar(derivative(e, x), {x: 0.0}) == at_zero


@pytest.mark.parametrize(
    ("e", "expected"),
    [
        (score, const(1.0)),
        (score * 3.0, const(3.0)),
        (exp(score - peak), exp(score - peak)),
        (score + q, const(1.0)),
        (const(2.0), const(0.0)),
        (sigmoid(score), sigmoid(score) * (1.0 - sigmoid(score))),
    ],
    ids=str,
)
def test_the_derivative_is_canonical(e: Expr, expected: Expr) -> None:
    assert derivative(e, score) == simplify(expected)


def test_what_has_no_derivative_is_refused() -> None:
    with pytest.raises(AlgebraError, match="mod"):
        derivative(score % 2.0, score)
