"""Canonical sums and products of real numbers: sorted, with constants gathered in one place."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce

from attn_compiler.algebra.expr import Expr, Sort, apply, const, real
from attn_compiler.algebra.notation import text


def canonical_real(e: Expr) -> Expr:
    """A real expression whose operands are canonical."""
    match e.op:
        case "add" | "sub" | "neg":
            return _sum(e)
        case "mul" | "div":
            return _product(e)
        case "min" | "max":
            a, b = sorted(e.args, key=text)
            return a if a == b else apply(e.op, a, b)
        case "real" if e.args[0].sort is Sort.REAL:
            return e.args[0]
        case "pow" if e.args[1].is_const and e.args[1].value == 1:
            return _real(e.args[0])
        case "log" if e.args[0].op == "exp":
            return _real(e.args[0].args[0])
    return e


def _value(constant: Expr) -> float:
    assert not isinstance(constant.value, str | None)
    return float(constant.value)


def _real(x: Expr) -> Expr:
    """A number among real ones, where an index is converted in the open."""
    if x.is_const:
        return const(_value(x))
    return x if x.sort is Sort.REAL else real(x)


def _sum(e: Expr) -> Expr:
    """Terms that occur several times are added up; the constant comes last."""
    factors: dict[Expr, float] = {}
    constant = 0.0
    for term, sign in _terms(e, 1.0):
        if term.is_const:
            constant += sign * _value(term)
        else:
            bare, factor = _factor(term)
            factors[bare] = factors.get(bare, 0.0) + sign * factor
    parts = [(term, n) for term, n in sorted(factors.items(), key=lambda item: text(item[0])) if n]
    if constant or not parts:
        parts.append((const(constant), 1.0))
    if not math.isfinite(constant):
        return e
    first, *rest = sorted(parts, key=lambda part: part[1] < 0)
    result = _scaled(*first)
    for term, n in rest:
        result = result - _scaled(term, -n) if n < 0 else result + _scaled(term, n)
    return result


def _terms(e: Expr, sign: float) -> Iterable[tuple[Expr, float]]:
    if e.sort is not Sort.REAL:
        yield _real(e), sign
        return
    match e.op:
        case "add" | "sub":
            yield from _terms(e.args[0], sign)
            yield from _terms(e.args[1], sign if e.op == "add" else -sign)
        case "neg":
            yield from _terms(e.args[0], -sign)
        case _:
            yield e, sign


def _factor(term: Expr) -> tuple[Expr, float]:
    """A product with a constant in front, apart."""
    if term.op == "mul" and term.args[0].is_const:
        return term.args[1], _value(term.args[0])
    return term, 1.0


def _scaled(term: Expr, factor: float) -> Expr:
    if term.is_const:
        return const(_value(term) * factor)
    return term if factor == 1 else const(factor) * term


def _product(e: Expr) -> Expr:
    """One constant, then the factors, then what they are divided by."""
    above: list[Expr] = []
    below: list[Expr] = []
    _factors(e, above, below)
    constant, divisor = (math.prod((_value(x) for x in part if x.is_const), start=1.0) for part in (above, below))
    if divisor and math.frexp(abs(divisor))[0] == 0.5:  # a power of two divides exactly
        constant, divisor = constant / divisor, 1.0
    if not math.isfinite(constant) or divisor == 0 or not math.isfinite(divisor):
        return e
    if constant == 0:
        return const(0.0)
    above, below = ([x for x in part if not x.is_const] for part in (above, below))
    common = [x for x in above if x in below]
    for x in common:
        if x in below and x.op == "exp":  # never zero
            above.remove(x)
            below.remove(x)
    if divisor != 1:
        below.append(const(divisor))
    top = _multiplied(above)
    if below:
        bottom = _multiplied(below)
        top = (const(1.0) if top is None else top) / (bottom if bottom is not None else const(1.0))
    if top is None:
        return const(constant)
    return top if constant == 1 else const(constant) * top


def _factors(e: Expr, above: list[Expr], below: list[Expr]) -> None:
    if e.sort is Sort.REAL and e.op in ("mul", "div"):
        _factors(e.args[0], above, below)
        _factors(e.args[1], *((above, below) if e.op == "mul" else (below, above)))
    elif e.sort is Sort.REAL and e.op == "neg":
        above.append(const(-1.0))
        _factors(e.args[0], above, below)
    else:
        above.append(_real(e))


def _multiplied(factors: list[Expr]) -> Expr | None:
    if not factors:
        return None
    return reduce(lambda a, b: a * b, sorted(factors, key=lambda x: (not x.is_const, text(x))))
