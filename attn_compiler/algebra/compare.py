"""Canonical comparisons: sums on either side of `<=`, a constant on the right, nothing that is always true or false."""

from __future__ import annotations

import math

from attn_compiler.algebra.boolean import conjunction, disjunction, negation
from attn_compiler.algebra.bounds import Box, bounds
from attn_compiler.algebra.evaluate import PYTHON
from attn_compiler.algebra.expr import Expr, Sort, apply, const, false, true
from attn_compiler.algebra.linear import Linear, at_most_zero, expression, is_index, linear
from attn_compiler.algebra.notation import text


def compared(op: str, a: Expr, b: Expr, facts: Box) -> Expr:
    """`a op b` for canonical operands."""
    if a.is_const and b.is_const:
        return const(bool(PYTHON[op](a.value, b.value)))
    if a == b and a.sort is not Sort.REAL:  # a real may be infinite, but never NaN
        return const(op != "lt")
    if op == "eq" and a.sort is Sort.BOOL:
        return _equivalent(a, b, facts)
    if not is_index(a, b):
        a, b = _bare(a), _bare(b)
        return _compared_reals(op, a, b, facts)
    difference = linear(a) - linear(b)
    if op == "eq":
        return _equal(difference, facts)
    return _at_most_zero(difference.plus(1) if op == "lt" else difference, facts)


def _at_most_zero(difference: Linear, facts: Box) -> Expr:
    lo, hi = bounds(expression(difference), facts)
    if hi <= 0 or lo > 0:
        return const(hi <= 0)
    split = _split(difference, facts)
    return at_most_zero(difference) if split is None else split


def _split(difference: Linear, facts: Box) -> Expr | None:
    """Resolve min, max, |x| and a choice of constants: they stand for several comparisons."""
    for atom, n in difference.terms:
        rest = Linear({a: m for a, m in difference.factors.items() if a != atom}, difference.constant)
        parts = _alternatives(atom)
        if parts is None:
            continue
        joins_all = (n > 0) == (atom.op != "min")
        comparisons = tuple(_at_most_zero(rest + linear(part) * n, facts) for part in parts)
        return conjunction(comparisons, facts) if joins_all else disjunction(comparisons, facts)
    for atom, n in difference.terms:
        if atom.op == "where" and all(a.is_const for a in atom.args[1:]):
            rest = Linear({a: m for a, m in difference.factors.items() if a != atom}, difference.constant)
            condition, yes, no = atom.args
            either = (_at_most_zero(rest + linear(x) * n, facts) for x in (yes, no))
            chosen = zip((condition, negation(condition)), either, strict=True)
            return disjunction(tuple(conjunction(pair, facts) for pair in chosen), facts)
    return None


def _alternatives(atom: Expr) -> tuple[Expr, Expr] | None:
    if atom.op in ("min", "max"):
        return atom.args[0], atom.args[1]
    return (atom.args[0], -atom.args[0]) if atom.op == "abs" else None


def _equal(difference: Linear, facts: Box) -> Expr:
    if not difference.factors:
        return const(difference.constant == 0)
    divisor = difference.divisor()
    if difference.constant % divisor:
        return false
    difference = Linear({a: n // divisor for a, n in difference.factors.items()}, difference.constant // divisor)
    lo, hi = bounds(expression(difference), facts)
    if lo > 0 or hi < 0:
        return false
    if lo == hi == 0:
        return true
    if difference.terms[0][1] < 0:
        difference = difference * -1
    for atom, n in difference.terms:
        if atom.op == "where" and all(a.is_const for a in atom.args[1:]):
            rest = Linear({a: m for a, m in difference.factors.items() if a != atom}, difference.constant)
            condition, yes, no = atom.args
            pairs = ((condition, rest + linear(yes) * n), (negation(condition), rest + linear(no) * n))
            return disjunction(tuple(conjunction((c, _equal(r, facts)), facts) for c, r in pairs), facts)
    left = Linear({a: n for a, n in difference.factors.items() if n > 0})
    right = Linear({a: -n for a, n in difference.factors.items() if n < 0}, -difference.constant)
    return apply("eq", expression(left), expression(right))


def _equivalent(a: Expr, b: Expr, facts: Box) -> Expr:
    both = conjunction((a, b), facts)
    neither = conjunction((negation(a), negation(b)), facts)
    return disjunction((both, neither), facts)


def _bare(x: Expr) -> Expr:
    """An index that was made a real number only to be compared."""
    return x.args[0] if x.op == "real" and x.args[0].sort is Sort.INDEX else x


def _compared_reals(op: str, a: Expr, b: Expr, facts: Box) -> Expr:
    if is_index(a, b):
        return compared(op, a, b, facts)
    rounded = _rounded(op, a, b)
    if rounded is not None:
        return compared("eq" if op == "eq" else "le", *rounded, facts)
    for x, y, flipped in ((a, b, False), (b, a, True)):
        if x.op == "where" and all(z.is_const for z in x.args[1:]) and y.is_const:
            truths = [compared(op, *((y, z) if flipped else (z, y)), facts) for z in x.args[1:]]
            return _pick(x.args[0], truths[0], truths[1], facts)
    lo, hi = bounds(apply(op, a, b), facts)
    if lo == hi:
        return const(bool(lo))
    if op == "eq":
        a, b = sorted((a, b), key=text)
    return apply(op, a, b)


def _pick(condition: Expr, yes: Expr, no: Expr, facts: Box) -> Expr:
    chosen = (conjunction((condition, yes), facts), conjunction((negation(condition), no), facts))
    return disjunction(chosen, facts)


def _rounded(op: str, a: Expr, b: Expr) -> tuple[Expr, Expr] | None:
    """Compare an index with an integer rather than with the real constant that was written."""
    if a.sort is Sort.INDEX and b.is_const and math.isfinite(float(b.value)):  # type: ignore[arg-type]
        value = float(b.value)  # type: ignore[arg-type]
        if op == "eq":
            return (a, const(int(value))) if value.is_integer() else None
        return a, const(math.ceil(value) - 1 if op == "lt" else math.floor(value))
    if b.sort is Sort.INDEX and a.is_const and math.isfinite(float(a.value)):  # type: ignore[arg-type]
        value = float(a.value)  # type: ignore[arg-type]
        if op == "eq":
            return (b, const(int(value))) if value.is_integer() else None
        return const(math.floor(value) + 1 if op == "lt" else math.ceil(value)), b
    return None
