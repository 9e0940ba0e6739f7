"""Evaluation that knows how far float64 may have strayed: a running error analysis, from which tests take their tolerance."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

from hypothesis import reject

from algebra.formulas import Place
from attn_compiler.algebra.evaluate import PYTHON, evaluate, read
from attn_compiler.algebra.expr import Expr, Sort

# IEEE operations err by half a unit in the last place; those of a libm by no more than two.
_UNITS = 2 * sys.float_info.epsilon


class Strayed(NamedTuple):
    """A value, and a bound on how far the exact one is from it."""

    value: float
    error: float


def strayed(e: Expr, place: Place) -> Strayed:
    """The value of `e`; examples in which rounding could decide a comparison are passed over."""

    def leaf(node: Expr, at: tuple[Strayed, ...]) -> Strayed:
        if node.op == "table":
            return Strayed(read(str(node.value), place.tables, [x.value for x in at]), 0.0)
        return Strayed(place.env[node] if node.op == "symbol" else node.value, 0.0)  # type: ignore[arg-type]

    return evaluate(e, leaf, {op: _counted(op) for op in PYTHON})


def agree(a: Expr, b: Expr, place: Place) -> bool:
    """Whether two formulas have the same value, as far as float64 can tell."""
    one, other = strayed(a, place), strayed(b, place)
    exact = a.sort is not Sort.REAL
    return one.value == other.value if exact else abs(one.value - other.value) <= one.error + other.error


def _counted(op: str) -> Callable[..., Strayed]:
    def counted(*operands: Strayed) -> Strayed:
        values = [x.value for x in operands]
        if op in ("lt", "le", "eq", "floor", "ceil"):
            _decided(op, operands)
        value = PYTHON[op](*values)
        error = _SPREADS.get(op, _no_spread)(*operands)
        inexact = isinstance(value, float) and op not in _EXACT
        return Strayed(value, error * (1 + _UNITS) + (abs(value) * _UNITS if inexact else 0.0))

    return counted


def _decided(op: str, operands: tuple[Strayed, ...]) -> None:
    """Pass over examples in which the exact result may be another one."""
    error = sum(x.error for x in operands)
    if not error:
        return
    if len(operands) == 1:
        value = operands[0].value
        reject() if math.floor(value - error) != math.floor(value + error) or value == round(value) else None
    elif abs(operands[0].value - operands[1].value) <= error:
        reject()


def _no_spread(*operands: Strayed) -> float:
    return 0.0


def _product(a: Strayed, b: Strayed) -> float:
    return abs(a.value) * b.error + abs(b.value) * a.error + a.error * b.error


def _quotient(a: Strayed, b: Strayed) -> float:
    least = abs(b.value) - b.error
    return (a.error + abs(a.value / b.value) * b.error) / least if least > 0 else math.inf


def _power(a: Strayed, b: Strayed) -> float:
    if b.error == 0.0 and float(b.value).is_integer() and b.value >= 0:
        return (abs(a.value) + a.error) ** b.value - abs(a.value) ** b.value
    if a.value <= a.error:
        return math.inf
    rise = Strayed(math.log(a.value), a.error / (a.value - a.error))
    return _grown(Strayed(b.value * rise.value, _product(b, rise)))


def _grown(a: Strayed) -> float:
    return math.exp(a.value) * math.expm1(a.error)


_EXACT = frozenset({"neg", "abs", "min", "max", "where", "real"})
_SPREADS: Mapping[str, Callable[..., float]] = {
    "add": lambda a, b: a.error + b.error,
    "sub": lambda a, b: a.error + b.error,
    "mul": _product,
    "div": _quotient,
    "pow": _power,
    "min": lambda a, b: max(a.error, b.error),
    "max": lambda a, b: max(a.error, b.error),
    "neg": lambda a: a.error,
    "abs": lambda a: a.error,
    "tanh": lambda a: a.error,
    "sigmoid": lambda a: a.error / 4,
    "exp": _grown,
    "log": lambda a: a.error / (a.value - a.error) if a.value > a.error else math.inf,
    "sqrt": lambda a: math.sqrt(a.error),
    "where": lambda c, a, b: a.error if c.value else b.error,
}
