"""Smallest and largest values of expressions over many boxes at once: interval arithmetic on arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from attn_compiler.algebra.expr import Expr, Sort

Values = NDArray[np.float64] | NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Extent:
    """One interval per box. Truth values are arrays of bool, where `lo` says *everywhere* and `hi` says *somewhere*."""

    lo: Values
    hi: Values

    @property
    def is_point(self) -> bool:
        return self.lo is self.hi

    @staticmethod
    def point(values: Values) -> Extent:
        return Extent(values, values)


class TableExtents(Protocol):
    """What is known of a run-time table: its extremes where every coordinate runs over an interval."""

    def extent(self, at: tuple[Extent, ...]) -> Extent: ...


Tables = Mapping[str, TableExtents]


def unknown(sort: Sort) -> Extent:
    if sort is Sort.BOOL:
        return Extent(np.array(False), np.array(True))
    return Extent(np.array(-np.inf), np.array(np.inf))


def extent(e: Expr, leaves: Mapping[Expr, Extent], tables: Tables) -> Extent:
    """Bound `e` where each leaf runs over its interval; what nobody knows is unbounded."""
    done: dict[Expr, Extent] = {}
    with np.errstate(all="ignore"):
        for node in e.walk():
            done[node] = leaves[node] if node in leaves else _node(node, tuple(done[a] for a in node.args), tables)
    return done[e]


def _node(node: Expr, args: tuple[Extent, ...], tables: Tables) -> Extent:
    if node.op == "const":
        return Extent.point(np.array(node.value, bool if node.sort is Sort.BOOL else float))
    if node.op == "table" and node.value in tables:
        return _of_sort(node.sort, tables[str(node.value)].extent(args))
    if node.op == "mod":
        return _mod(args[0], args[1], node.sort is Sort.INDEX)
    if node.op == "mul" and node.args[0] == node.args[1]:  # a square, which is never negative
        size = _abs(args[0])
        return _mul(size, size)
    rule = _RULES.get(node.op)
    return unknown(node.sort) if rule is None else rule(*args)


def _of_sort(sort: Sort, found: Extent) -> Extent:
    return Extent(found.lo != 0, found.hi != 0) if sort is Sort.BOOL else found


def _sound(lo: Values, hi: Values) -> Extent:
    """Where infinities cancelled, nothing is known."""
    if lo is hi and not np.isnan(lo).any():
        return Extent(lo, lo)
    return Extent(np.where(np.isnan(lo), -np.inf, lo), np.where(np.isnan(hi), np.inf, hi))


def _increasing(f: Callable[..., Values]) -> Callable[..., Extent]:
    """Lift a function that grows with each of its operands."""

    def lifted(*args: Extent) -> Extent:
        lo = f(*(a.lo for a in args))
        return _sound(lo, lo if all(a.is_point for a in args) else f(*(a.hi for a in args)))

    return lifted


def _neg(a: Extent) -> Extent:
    lo = np.negative(a.hi)
    return Extent(lo, lo if a.is_point else np.negative(a.lo))


_add = _increasing(np.add)


def _sub(a: Extent, b: Extent) -> Extent:
    lo = a.lo - b.hi
    return _sound(lo, lo if a.is_point and b.is_point else a.hi - b.lo)


def _abs(a: Extent) -> Extent:
    ends = np.abs(a.lo), np.abs(a.hi)
    return Extent(np.where((a.lo <= 0) & (a.hi >= 0), 0.0, np.minimum(*ends)), np.maximum(*ends))


def _corners(f: Callable[[Values, Values], Values], a: Extent, b: Extent) -> Extent:
    """Lift a function whose extremes over a box lie in its corners."""
    if a.is_point and b.is_point:
        value = f(a.lo, b.lo)
        return _sound(value, value)
    found = np.stack(np.broadcast_arrays(f(a.lo, b.lo), f(a.lo, b.hi), f(a.hi, b.lo), f(a.hi, b.hi)))
    return _sound(found.min(axis=0), found.max(axis=0))


def _mul(a: Extent, b: Extent) -> Extent:
    def product(x: Values, y: Values) -> Values:
        return np.where((x == 0) | (y == 0), 0.0, x * y)  # nothing times infinity is nothing here

    return _corners(product, a, b)


def _unless(hopeless: Values, found: Extent) -> Extent:
    if not hopeless.any():
        return found
    return Extent(np.where(hopeless, -np.inf, found.lo), np.where(hopeless, np.inf, found.hi))


def _div(a: Extent, b: Extent) -> Extent:
    return _unless((b.lo <= 0) & (b.hi >= 0), _corners(np.divide, a, b))


def _floordiv(a: Extent, b: Extent) -> Extent:
    exact = _corners(lambda x, y: np.where(np.isinf(x) & np.isfinite(y), x * np.sign(y), np.floor_divide(x, y)), a, b)
    return _unless((b.lo <= 0) & (b.hi >= 0), exact)


def _pow(a: Extent, b: Extent) -> Extent:
    return _unless((a.lo <= 0) if not (a.is_point and b.is_point) else np.array(False), _corners(np.power, a, b))


def _mod(a: Extent, b: Extent, whole: bool) -> Extent:
    if a.is_point and b.is_point:
        value = np.mod(a.lo, b.lo)
        return _sound(value, value)
    same_multiple = (b.lo == b.hi) & (b.lo > 0) & (np.floor_divide(a.lo, b.lo) == np.floor_divide(a.hi, b.lo))
    lo = np.where(same_multiple, np.mod(a.lo, b.lo), 0.0)
    hi = np.where(same_multiple, np.mod(a.hi, b.lo), b.hi - 1 if whole else b.hi)
    return _unless(b.lo <= 0, _sound(lo, hi))


def _log(a: Extent) -> Extent:
    return _increasing(lambda x: np.log(np.maximum(x, 0)))(a)


def _sqrt(a: Extent) -> Extent:
    return _increasing(lambda x: np.sqrt(np.maximum(x, 0)))(a)


def _sigmoid(a: Extent) -> Extent:
    return _increasing(lambda x: 1 / (1 + np.exp(-x)))(a)


def _lt(a: Extent, b: Extent) -> Extent:
    lo = a.hi < b.lo
    return Extent(lo, lo if a.is_point and b.is_point else a.lo < b.hi)


def _le(a: Extent, b: Extent) -> Extent:
    lo = a.hi <= b.lo
    return Extent(lo, lo if a.is_point and b.is_point else a.lo <= b.hi)


def _eq(a: Extent, b: Extent) -> Extent:
    if a.is_point and b.is_point:
        return Extent.point(a.lo == b.lo)
    return Extent((a.lo == a.hi) & (b.lo == b.hi) & (a.lo == b.lo), (a.lo <= b.hi) & (b.lo <= a.hi))


def _not(a: Extent) -> Extent:
    return Extent(np.logical_not(a.hi), np.logical_not(a.lo))


def _where(condition: Extent, yes: Extent, no: Extent) -> Extent:
    minimum, maximum = (np.logical_and, np.logical_or) if yes.lo.dtype == bool else (np.minimum, np.maximum)
    lo = np.where(condition.lo, yes.lo, np.where(condition.hi, minimum(yes.lo, no.lo), no.lo))
    hi = np.where(condition.lo, yes.hi, np.where(condition.hi, maximum(yes.hi, no.hi), no.hi))
    return Extent(lo, lo) if condition.is_point and yes.is_point and no.is_point else Extent(lo, hi)


_RULES: Mapping[str, Callable[..., Extent]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "floordiv": _floordiv,
    "pow": _pow,
    "neg": _neg,
    "abs": _abs,
    "min": _increasing(np.minimum),
    "max": _increasing(np.maximum),
    "exp": _increasing(np.exp),
    "log": _log,
    "sqrt": _sqrt,
    "tanh": _increasing(np.tanh),
    "sigmoid": _sigmoid,
    "real": lambda a: a,
    "ceil": _increasing(np.ceil),
    "floor": _increasing(np.floor),
    "lt": _lt,
    "le": _le,
    "eq": _eq,
    "and": _increasing(np.logical_and),
    "or": _increasing(np.logical_or),
    "not": _not,
    "where": _where,
}
