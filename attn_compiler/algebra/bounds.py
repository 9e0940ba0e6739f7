"""Interval analysis: what values an expression can have where its leaves run over intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import Enum
from typing import NamedTuple

from attn_compiler.algebra.evaluate import PYTHON
from attn_compiler.algebra.expr import Expr, Sort, k, q
from attn_compiler.algebra.linear import Linear, is_index, linear


class Interval(NamedTuple):
    """From `lo` to `hi`, both included. A truth value is 0 or 1."""

    lo: float
    hi: float

    @property
    def is_empty(self) -> bool:
        return self.lo > self.hi

    def __and__(self, other: Interval) -> Interval:
        return Interval(max(self.lo, other.lo), min(self.hi, other.hi))

    def __or__(self, other: Interval) -> Interval:
        """The smallest interval that holds both."""
        if self.is_empty or other.is_empty:
            return other if self.is_empty else self
        return Interval(min(self.lo, other.lo), max(self.hi, other.hi))


class Occupancy(Enum):
    """How much of a tile a mask shows."""

    EMPTY = "empty"
    MIXED = "mixed"
    FULL = "full"


Box = Mapping[Expr, Interval]
ANY = Interval(-math.inf, math.inf)
EMPTY = Interval(math.inf, -math.inf)
_MAYBE, _ALWAYS, _NEVER = Interval(0, 1), Interval(1, 1), Interval(0, 0)
_UNBOUNDED: Box = {}


def bounds(e: Expr, box: Box = _UNBOUNDED) -> Interval:
    """An interval that holds every value of `e`, for whatever values its leaves take in `box`."""
    done: dict[Expr, Interval] = {}
    return _within(e, box, done)


def occupancy(mask: Expr, box: Box) -> Occupancy:
    """Whether `mask` holds everywhere in `box`, nowhere, or nobody knows."""
    lo, hi = bounds(mask, box)
    return Occupancy.FULL if lo >= 1 else Occupancy.EMPTY if hi <= 0 else Occupancy.MIXED


def distance(mask: Expr) -> Interval:
    """Bounds on q - k wherever `mask` holds; empty where it holds nowhere."""
    match mask.op:
        case "const":
            return ANY if mask.value else EMPTY
        case "and":
            return distance(mask.args[0]) & distance(mask.args[1])
        case "or":
            return distance(mask.args[0]) | distance(mask.args[1])
        case "lt" | "le" | "eq":
            return _compared_distance(mask)
    return ANY


def _compared_distance(mask: Expr) -> Interval:
    a, b = mask.args
    if a.sort is not Sort.INDEX or b.sort is not Sort.INDEX:
        return ANY
    difference = linear(a) - linear(b)
    if set(difference.factors) != {q, k} or difference.factors[q] != -difference.factors[k]:
        return ANY
    factor, limit = difference.factors[q], -difference.constant - (mask.op == "lt")
    if mask.op == "eq":
        exact = limit / factor
        return Interval(exact, exact)
    return Interval(-math.inf, limit // factor) if factor > 0 else Interval(-(limit // -factor), math.inf)


def _within(e: Expr, box: Box, done: dict[Expr, Interval]) -> Interval:
    if e not in done:
        for node in e.walk():
            if node not in done:
                done[node] = _bounds(node, box, done)
    return done[e]


def _bounds(node: Expr, box: Box, done: dict[Expr, Interval]) -> Interval:
    if node in box:
        return box[node]
    if node.op == "const":
        value = float(node.value)  # type: ignore[arg-type]
        return Interval(value, value)
    if node.op in ("symbol", "table"):
        return _MAYBE if node.sort is Sort.BOOL else ANY
    args = [done[a] for a in node.args]
    if node.op == "mul" and node.args[0] == node.args[1]:
        args = [_abs(args[0]), _abs(args[0])]
    found = _RULES[node.op](*args)
    if node.op == "mod" and node.sort is Sort.INDEX and args[1].lo > 0:
        found &= Interval(-math.inf, args[1].hi - 1)
    if node.op in ("lt", "le", "eq") and is_index(*node.args):
        difference = linear(node.args[0]) - linear(node.args[1])
        together = _sign(node.op, _linear_bounds(difference, box, done))
        return found if together == _MAYBE else together
    if node.sort is Sort.INDEX and node.op in ("add", "sub", "mul", "neg") and node not in linear(node).factors:
        return found & _linear_bounds(linear(node), box, done)
    return found


def _linear_bounds(total: Linear, box: Box, done: dict[Expr, Interval]) -> Interval:
    """Bounds that know `q - k` and `k` move together."""
    lo = hi = float(total.constant)
    for atom, factor in total.factors.items():
        a, b = _within(atom, box, done)
        ends = (_product(a, factor), _product(b, factor))
        lo, hi = lo + min(ends), hi + max(ends)
    return Interval(lo, hi)


def _sign(op: str, difference: Interval) -> Interval:
    """Truth of `difference op 0`."""
    lo, hi = difference
    if op == "eq":
        return _NEVER if lo > 0 or hi < 0 else _ALWAYS if lo == hi == 0 else _MAYBE
    strict = op == "lt"
    if hi < 0 or (hi == 0 and not strict):
        return _ALWAYS
    return _NEVER if lo > 0 or (lo == 0 and strict) else _MAYBE


def _product(x: float, y: float) -> float:
    return 0.0 if x == 0 or y == 0 else x * y


def _mul(a: Interval, b: Interval) -> Interval:
    ends = [_product(x, y) for x in a for y in b]
    return Interval(min(ends), max(ends))


def _quotient(x: float, y: float) -> float:
    return 0.0 if math.isinf(y) else x / y


def _div(a: Interval, b: Interval) -> Interval:
    if b.lo <= 0 <= b.hi:
        return ANY
    ends = [_quotient(x, y) for x in a for y in b]
    return Interval(min(ends), max(ends))


def _floor(x: float) -> float:
    return math.floor(x) if math.isfinite(x) else x


def _floordiv(a: Interval, b: Interval) -> Interval:
    exact = _div(a, b)
    low = -1.0 if math.isinf(b.hi) and a.lo < 0 else _floor(exact.lo)
    return Interval(min(low, _floor(exact.lo)), _floor(exact.hi))


def _mod(a: Interval, b: Interval) -> Interval:
    if b.lo <= 0:
        return ANY if b.hi >= 0 else Interval(b.lo, 0)
    if a.lo >= 0 and a.hi < b.lo:
        return a
    if b.lo == b.hi and math.isfinite(a.lo) and math.isfinite(a.hi) and a.lo // b.lo == a.hi // b.lo:
        return Interval(a.lo % b.lo, a.hi % b.lo)
    return Interval(0, b.hi)


def _abs(a: Interval) -> Interval:
    if a.lo <= 0 <= a.hi:
        return Interval(0, max(-a.lo, a.hi))
    return Interval(min(abs(a.lo), abs(a.hi)), max(abs(a.lo), abs(a.hi)))


def _pow(a: Interval, b: Interval) -> Interval:
    whole = b.lo == b.hi >= 0 and b.lo % 1 == 0
    if whole and b.lo % 2 == 0:
        a = _abs(a)
    if a.lo <= 0 and not whole:
        return ANY
    ends = [_power(x, y) for x in a for y in b]
    return _widened(Interval(min(ends), max(ends)))


def _power(x: float, y: float) -> float:
    try:
        return math.pow(x, y)
    except OverflowError:
        return math.inf


def _widened(a: Interval) -> Interval:
    """What rounding may have cut off."""
    return Interval(_beyond(a.lo, -math.inf), _beyond(a.hi, math.inf))


def _beyond(x: float, towards: float) -> float:
    return math.nextafter(math.nextafter(x, towards), towards)


def _rising(f: Callable[[float], float], least: float, greatest: float) -> Callable[[Interval], Interval]:
    """A function that never falls, with its limits; outside of where it is defined, nothing is known."""

    def rule(a: Interval) -> Interval:
        try:
            lo = least if a.lo == -math.inf else f(a.lo)
            hi = greatest if a.hi == math.inf else f(a.hi)
        except (ValueError, OverflowError):
            return ANY
        return _widened(Interval(lo, hi)) & Interval(min(least, lo), max(greatest, hi))

    return rule


def _log(x: float) -> float:
    return -math.inf if x == 0 else math.log(x)


def _choose(c: Interval, yes: Interval, no: Interval) -> Interval:
    return yes if c.lo >= 1 else no if c.hi <= 0 else yes | no


def _equal(a: Interval, b: Interval) -> Interval:
    return _NEVER if (a & b).is_empty else _ALWAYS if a.lo == a.hi == b.lo == b.hi else _MAYBE


_RULES: Mapping[str, Callable[..., Interval]] = {
    "add": lambda a, b: Interval(a.lo + b.lo, a.hi + b.hi),
    "sub": lambda a, b: Interval(a.lo - b.hi, a.hi - b.lo),
    "mul": _mul,
    "div": _div,
    "floordiv": _floordiv,
    "mod": _mod,
    "pow": _pow,
    "min": lambda a, b: Interval(min(a.lo, b.lo), min(a.hi, b.hi)),
    "max": lambda a, b: Interval(max(a.lo, b.lo), max(a.hi, b.hi)),
    "neg": lambda a: Interval(-a.hi, -a.lo),
    "abs": _abs,
    "exp": _rising(PYTHON["exp"], 0, math.inf),
    "log": _rising(_log, -math.inf, math.inf),
    "sqrt": _rising(math.sqrt, 0, math.inf),
    "tanh": _rising(math.tanh, -1, 1),
    "sigmoid": _rising(PYTHON["sigmoid"], 0, 1),
    "real": lambda a: a,
    "ceil": lambda a: Interval(-_floor(-a.lo), -_floor(-a.hi)),
    "floor": lambda a: Interval(_floor(a.lo), _floor(a.hi)),
    "lt": lambda a, b: _ALWAYS if a.hi < b.lo else _NEVER if a.lo >= b.hi else _MAYBE,
    "le": lambda a, b: _ALWAYS if a.hi <= b.lo else _NEVER if a.lo > b.hi else _MAYBE,
    "eq": _equal,
    "and": lambda a, b: Interval(min(a.lo, b.lo), min(a.hi, b.hi)),
    "or": lambda a, b: Interval(max(a.lo, b.lo), max(a.hi, b.hi)),
    "not": lambda a: Interval(1 - a.hi, 1 - a.lo),
    "where": _choose,
}
