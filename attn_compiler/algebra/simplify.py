"""One canonical form for expressions, so that what means the same compares equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

from attn_compiler.algebra.boolean import conjunction, disjunction, flat, negation
from attn_compiler.algebra.bounds import Box, Interval, bounds
from attn_compiler.algebra.compare import compared
from attn_compiler.algebra.evaluate import PYTHON
from attn_compiler.algebra.expr import Expr, Sort, apply, const, false, real, rebuild, true
from attn_compiler.algebra.linear import Linear, expression, linear
from attn_compiler.algebra.notation import text
from attn_compiler.algebra.product import canonical_real

_NO_FACTS: Box = {}


def simplify(e: Expr, facts: Box = _NO_FACTS) -> Expr:
    """The canonical form of `e`, where `facts` bound its leaves and sums of them. Real sums and products may be reordered."""
    if not facts:
        return _known(e)
    return _simplify(e, facts)


def conjuncts(e: Expr) -> tuple[Expr, ...]:
    """The conditions that `e` joins by "and"; none for true."""
    if e == true:
        return ()
    return conjuncts(e.args[0]) + conjuncts(e.args[1]) if e.op == "and" else (e,)


def disjuncts(e: Expr) -> tuple[Expr, ...]:
    """The conditions that `e` joins by "or"; none for false."""
    if e == false:
        return ()
    return disjuncts(e.args[0]) + disjuncts(e.args[1]) if e.op == "or" else (e,)


@lru_cache(maxsize=1 << 12)
def _known(e: Expr) -> Expr:
    return _simplify(e, _NO_FACTS)


def _simplify(e: Expr, facts: Box) -> Expr:
    done: dict[Expr, Expr] = {}
    chained = _chained(e)
    for node in e.walk():
        if node.op in _JOINS:
            if node not in chained:
                done[node] = _JOINS[node.op]((done[part] for part in flat(node.op, (node,))), facts)
            continue
        args = tuple(done[a] for a in node.args)
        done[node] = _node(node if args == node.args else rebuild(node, args), facts)
    return done[e]


def _chained(e: Expr) -> frozenset[Expr]:
    """What only stands inside a longer chain of "and" or of "or", which is made canonical once, as a whole."""
    users: dict[Expr, set[str]] = {}
    for node in e.walk():
        for arg in node.args:
            users.setdefault(arg, set()).add(node.op)
    return frozenset(node for node, ops in users.items() if ops == {node.op})


def _node(e: Expr, facts: Box) -> Expr:
    """`e`, whose operands are canonical."""
    if not e.args or e.op == "table":
        return _pinned(e, facts)
    if all(a.is_const for a in e.args):
        return _folded(e)
    if e.op in _LOGIC:
        return _LOGIC[e.op](e, facts)
    if e.op in ("lt", "le", "eq"):
        return compared(e.op, e.args[0], e.args[1], facts)
    if e.sort is Sort.INDEX:
        return _pinned(_index(e, facts), facts)
    return canonical_real(e)


def _pinned(e: Expr, facts: Box) -> Expr:
    """A leaf that can only have one value is that value."""
    if e.sort is not Sort.INDEX or not facts:
        return e
    lo, hi = bounds(e, facts)
    return const(int(lo)) if lo == hi else e


def _folded(e: Expr) -> Expr:
    """An operation on constants, unless it has no finite value."""
    try:
        value = PYTHON[e.op](*(a.value for a in e.args))
    except (ArithmeticError, ValueError):
        return e
    if isinstance(value, complex) or (isinstance(value, float) and math.isnan(value)):
        return e
    return const(float(value) if e.sort is Sort.REAL else value)


def _index(e: Expr, facts: Box) -> Expr:
    match e.op:
        case "add" | "sub" | "neg" | "mul":
            return expression(linear(e))
        case "floordiv" | "mod" if e.args[1].is_const and e.args[1].value > 0:  # type: ignore[operator]
            return _divided(e, facts)
        case "floordiv" | "mod":
            return _divided_by_size(e, facts)
        case "min" | "max":
            return _extreme(e, facts)
        case "abs":
            lo, hi = bounds(e.args[0], facts)
            return e.args[0] if lo >= 0 else expression(linear(-e.args[0])) if hi <= 0 else _unsigned(e.args[0])
        case "where":
            return _chosen(e, facts)
        case "floor" | "ceil" if e.args[0].op == "real":
            return e.args[0].args[0]
        case "floor" | "ceil" if e.args[0].sort is Sort.INDEX:
            return e.args[0]
    return e


def _unsigned(x: Expr) -> Expr:
    """|x| and |-x| are one."""
    total = linear(x)
    return apply("abs", x if total.terms[0][1] > 0 else expression(total * -1))


def _divided(e: Expr, facts: Box) -> Expr:
    """Pull multiples of the divisor out of `x // n` and `x % n`; what is left may vanish by its range."""
    divisor = e.args[1].value
    assert isinstance(divisor, int)
    total = linear(e.args[0])
    whole = Linear({a: n // divisor for a, n in total.factors.items() if n % divisor == 0}, total.constant // divisor)
    rest = Linear({a: n for a, n in total.factors.items() if n % divisor}, total.constant % divisor)
    inside = expression(rest)
    lo, hi = bounds(inside, facts)
    fits = lo >= 0 and hi < divisor
    if e.op == "mod":
        return inside if fits else _remainder(inside, divisor)
    quotient = Linear({}) if fits or divisor == 1 else linear(_quotient(inside, divisor))
    return expression(whole + quotient)


def _divided_by_size(e: Expr, facts: Box) -> Expr:
    """`(i * n + k) // n` is `i` and `(i * n + k) % n` is `k` where facts say `0 <= k < n`, whatever number `n` is."""
    divisor, total = e.args[1], linear(e.args[0])
    whole = {_without(atom, divisor): m for atom, m in total.factors.items() if _has_factor(atom, divisor)}
    rest = Linear({a: m for a, m in total.factors.items() if not _has_factor(a, divisor)}, total.constant)
    inside = expression(rest)
    left = expression(linear(divisor) - rest)
    if bounds(inside, facts).lo < 0 or bounds(left, facts).lo < 1:
        return e
    return inside if e.op == "mod" else expression(sum((linear(a) * m for a, m in whole.items()), Linear({})))


def _has_factor(product: Expr, factor: Expr) -> bool:
    return product == factor or (product.op == "mul" and any(_has_factor(x, factor) for x in product.args))


def _without(product: Expr, factor: Expr) -> Expr:
    """A product that has a factor, divided by it once."""
    if product == factor:
        return const(1)
    a, b = product.args
    return expression(linear(_without(a, factor) * b if _has_factor(a, factor) else a * _without(b, factor)))


def _quotient(x: Expr, divisor: int) -> Expr:
    if x.op == "floordiv" and x.args[1].is_const and x.args[1].value > 0:  # type: ignore[operator]
        return x.args[0] // (x.args[1] * divisor).transform(_node_without_facts)
    return x // divisor


def _remainder(x: Expr, divisor: int) -> Expr:
    if divisor == 1:
        return const(0)
    if x.op == "mod" and x.args[1].is_const and x.args[1].value % divisor == 0:  # type: ignore[operator]
        return x.args[0] % divisor
    return x % divisor


def _node_without_facts(e: Expr) -> Expr:
    return _node(e, _NO_FACTS)


def _extreme(e: Expr, facts: Box) -> Expr:
    a, b = sorted(e.args, key=text)
    if a == b:
        return a
    difference = bounds(a - b, facts)
    if difference.hi <= 0:
        return a if e.op == "min" else b
    if difference.lo >= 0:
        return b if e.op == "min" else a
    return apply(e.op, a, b)


def _chosen(e: Expr, facts: Box) -> Expr:
    condition, yes, no = e.args
    if condition.is_const or yes == no:
        chosen = yes if condition == true or yes == no else no
        return chosen if chosen.sort is e.sort else _node(real(chosen), facts)
    if e.sort is Sort.BOOL:
        return disjunction((conjunction((condition, yes), facts), conjunction((negation(condition), no), facts)), facts)
    opposite = negation(condition)
    if condition.op == "not" or (opposite.op != "not" and text(opposite) < text(condition)):
        return apply("where", opposite, no, yes)
    return e


_JOINS: Mapping[str, Callable[[Iterable[Expr], Box], Expr]] = {"and": conjunction, "or": disjunction}
_LOGIC: Mapping[str, Callable[[Expr, Box], Expr]] = {
    "not": lambda e, _: negation(e.args[0]),
    "where": _chosen,
}


def implied(mask: Expr, condition: Expr, facts: Mapping[Expr, Interval] = _NO_FACTS) -> bool:
    """Whether `condition` holds wherever `mask` does, as far as canonical forms can tell."""
    joined = simplify(mask, facts)
    return simplify(joined & condition, facts) == joined
