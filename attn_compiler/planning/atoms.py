"""A mask as `and` and `or` over comparisons whose one side speaks of the query and whose other side speaks of the key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from attn_compiler.algebra.expr import Expr, Sort, apply, const, i, k, q, same


class Side(Enum):
    """Which tokens an expression speaks of."""

    NEITHER = frozenset[Expr]()
    QUERY = frozenset({q, i})
    KEY = frozenset({k})
    BOTH = frozenset({q, i, k})


def side(e: Expr) -> Side:
    spoken = e.symbols()
    by_query, by_key = bool(spoken & Side.QUERY.value), bool(spoken & Side.KEY.value)
    if by_query and by_key:
        return Side.BOTH
    return Side.QUERY if by_query else Side.KEY if by_key else Side.NEITHER


@dataclass(frozen=True)
class Below:
    """`key <= query`, or `key < query`."""

    key: Expr
    query: Expr
    strict: bool


@dataclass(frozen=True)
class Alone:
    """A condition on the query alone or on the key alone."""

    condition: Expr
    side: Side


@dataclass(frozen=True)
class Opaque:
    """A condition that does not separate."""

    condition: Expr


@dataclass(frozen=True)
class Both:
    parts: tuple[Formula, ...]


@dataclass(frozen=True)
class Any:
    parts: tuple[Formula, ...]


Atom = Below | Alone | Opaque
Formula = Atom | Both | Any


def formula(mask: Expr, holds: bool = True) -> Formula:
    """Take a mask apart; with `holds=False`, its negation, which is pushed down to the comparisons."""
    args, op = mask.args, mask.op
    if op == "not":
        return formula(args[0], not holds)
    if op in ("and", "or"):
        return _joined((op == "and") is holds, *(formula(a, holds) for a in args))
    if op == "where":
        return _joined(False, _joined(True, formula(args[0]), formula(args[1], holds)), _unless(args[0], args[2], holds))
    if op == "eq" and args[0].sort is Sort.BOOL:
        return _joined(False, _joined(True, formula(args[0]), formula(args[1], holds)), _unless(args[0], args[1], not holds))
    if op == "eq":
        return _equal(args[0], args[1], holds)
    if op in ("lt", "le"):
        strict = (op == "lt") is holds
        return _below(args[0], args[1], strict) if holds else _below(args[1], args[0], strict)
    return _alone(mask if holds else ~mask)


def atoms(parts: Formula) -> Iterator[Atom]:
    """Yield every comparison of a formula."""
    if isinstance(parts, Both | Any):
        for part in parts.parts:
            yield from atoms(part)
    else:
        yield parts


def _joined(conjunction: bool, *parts: Formula) -> Formula:
    kind = Both if conjunction else Any
    flat = [inner for part in parts for inner in (part.parts if isinstance(part, kind) else (part,))]
    return kind(tuple(flat))


def _unless(condition: Expr, mask: Expr, holds: bool) -> Formula:
    return _joined(True, formula(condition, False), formula(mask, holds))


def _alone(condition: Expr) -> Formula:
    spoken = side(condition)
    return Opaque(condition) if spoken is Side.BOTH else Alone(condition, spoken)


def _equal(a: Expr, b: Expr, holds: bool) -> Formula:
    if side(same(a, b)) is not Side.BOTH:
        return _alone(same(a, b) if holds else ~same(a, b))
    a, b = _congruent(a, b)
    return _joined(holds, *(_below(x, y, not holds) for x, y in ((a, b), (b, a))))


def _congruent(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """`(q - k) % n == c` → `q % n == (k + c) % n`, in which each side speaks of one token."""
    if a.op != "mod" or not (a.args[1].is_const and b.is_const and a.sort is Sort.INDEX):
        return a, b
    modulus, remainder, terms = a.args[1].value, b.value, separated(a.args[0])
    assert isinstance(modulus, int | float)
    assert isinstance(remainder, int | float)
    if terms is None or not 0 <= remainder < modulus:
        return a, b
    return terms[0] % modulus, (b - terms[1]) % modulus


def separated(e: Expr) -> tuple[Expr, Expr] | None:
    """`e` as a sum of a part that speaks of the query and one that speaks of the key; None where it is no such sum."""
    spoken = side(e)
    if spoken is not Side.BOTH:
        return (const(0), e) if spoken is Side.KEY else (e, const(0))
    if e.op == "mul" and Side.NEITHER in (side(e.args[0]), side(e.args[1])):
        factor, rest = e.args if side(e.args[0]) is Side.NEITHER else e.args[::-1]
        terms = separated(rest)
        return None if terms is None else (terms[0] * factor, terms[1] * factor)
    if e.op not in ("add", "sub", "neg", "real"):
        return None
    parts = [separated(a) for a in e.args]
    if any(part is None for part in parts):
        return None
    known = [part for part in parts if part is not None]
    return apply(e.op, *(part[0] for part in known)), apply(e.op, *(part[1] for part in known))


def _below(a: Expr, b: Expr, strict: bool) -> Formula:
    """`a <= b` or `a < b`, opened until each comparison separates."""
    compared = apply("lt" if strict else "le", a, b)
    if side(compared) is not Side.BOTH:
        return _alone(compared)
    for mine, other, left in ((a, b, True), (b, a, False)):
        opened = None if side(mine) is not Side.BOTH else _opened(mine, other, left, strict)
        if opened is not None:
            return opened
    terms = separated(a - b)
    if terms is None:
        return Opaque(compared)
    return Below(terms[1], -terms[0], strict)


def _opened(a: Expr, b: Expr, left: bool, strict: bool) -> Formula | None:
    """Open `max`, `min`, `abs` and `where` on one side of a comparison."""

    def compare(x: Expr) -> Formula:
        return _below(x, b, strict) if left else _below(b, x, strict)

    if a.op in ("max", "min"):
        return _joined((a.op == "max") is left, *(compare(x) for x in a.args))
    if a.op == "abs":
        return _joined(left, compare(a.args[0]), compare(-a.args[0]))
    if a.op == "where":
        condition = a.args[0]
        yes = _joined(True, formula(condition), compare(a.args[1]))
        return _joined(False, yes, _joined(True, formula(condition, False), compare(a.args[2])))
    return None
