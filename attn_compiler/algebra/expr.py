"""Scalar expressions over the coordinates of attention: the one language masks, scores and normalizers are written in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self
from weakref import WeakValueDictionary

from attn_compiler.errors import AlgebraError


class Sort(Enum):
    """What an expression stands for. Targets need it: an index is never silently a real."""

    BOOL = "bool"
    INDEX = "index"
    REAL = "real"

    def __repr__(self) -> str:
        return self.name


Scalar = bool | int | float


def _numeric(args: tuple[Expr, ...]) -> Sort:
    return Sort.REAL if any(a.sort is Sort.REAL for a in args) else Sort.INDEX


def _always(sort: Sort) -> Callable[[tuple[Expr, ...]], Sort]:
    return lambda _: sort


def _chosen(args: tuple[Expr, ...]) -> Sort:
    both = args[1:]
    return Sort.BOOL if all(a.sort is Sort.BOOL for a in both) else _numeric(both)


@dataclass(frozen=True)
class Operation:
    """How many operands an operation takes, of which sorts, and the sort it gives."""

    arity: int
    result: Callable[[tuple[Expr, ...]], Sort]
    takes: tuple[Sort, ...] = (Sort.INDEX, Sort.REAL)


_REAL, _TRUTH = _always(Sort.REAL), _always(Sort.BOOL)

OPERATIONS: Mapping[str, Operation] = {
    **dict.fromkeys(("add", "sub", "mul", "floordiv", "mod", "min", "max"), Operation(2, _numeric)),
    **dict.fromkeys(("div", "pow"), Operation(2, _REAL)),
    **dict.fromkeys(("neg", "abs"), Operation(1, _numeric)),
    **dict.fromkeys(("exp", "log", "sqrt", "tanh", "sigmoid", "real"), Operation(1, _REAL)),
    **dict.fromkeys(("ceil", "floor"), Operation(1, _always(Sort.INDEX))),
    **dict.fromkeys(("lt", "le"), Operation(2, _TRUTH)),
    "eq": Operation(2, _TRUTH, (Sort.INDEX, Sort.REAL, Sort.BOOL)),
    **dict.fromkeys(("and", "or"), Operation(2, _TRUTH, (Sort.BOOL,))),
    "not": Operation(1, _TRUTH, (Sort.BOOL,)),
    "where": Operation(3, _chosen, (Sort.INDEX, Sort.REAL, Sort.BOOL)),
}


_known: WeakValueDictionary[tuple[object, ...], Any] = WeakValueDictionary()


@dataclass(frozen=True, slots=True, repr=False, eq=False, weakref_slot=True)
class Expr:
    """One operation applied to expressions, or a leaf: `const`, `symbol`, or `table` (a run-time tensor read at `args`).

    Build one with the constructors and operators of this module, which work out `sort`. Equal expressions are one object, so
    that comparing and hashing cost the same for all sizes.
    """

    op: str
    args: tuple[Expr, ...]
    value: Scalar | str | None
    sort: Sort

    def __new__(cls, op: str, args: tuple[Expr, ...], value: Scalar | str | None, sort: Sort) -> Self:
        key = (op, args, value, sort)
        found: Self | None = _known.get(key)
        if found is None:
            found = _known.setdefault(key, object.__new__(cls))
        return found

    def __bool__(self) -> bool:
        raise AlgebraError(
            "an expression has no truth value: write `(a < b) & (b < c)` instead of `a < b < c`, "
            "and `&`, `|`, `~`, `where`, `same` instead of `and`, `or`, `not`, `if`, `==`"
        )

    def __reduce__(self) -> tuple[object, ...]:
        return Expr, (self.op, self.args, self.value, self.sort)

    def __repr__(self) -> str:
        inner = [repr(self.value)] if self.value is not None else []
        return f"{self.op}({', '.join(inner + [repr(a) for a in self.args])})"

    def __add__(self, other: Operand) -> Expr:
        return apply("add", self, other)

    def __radd__(self, other: Operand) -> Expr:
        return apply("add", other, self)

    def __sub__(self, other: Operand) -> Expr:
        return apply("sub", self, other)

    def __rsub__(self, other: Operand) -> Expr:
        return apply("sub", other, self)

    def __mul__(self, other: Operand) -> Expr:
        return apply("mul", self, other)

    def __rmul__(self, other: Operand) -> Expr:
        return apply("mul", other, self)

    def __truediv__(self, other: Operand) -> Expr:
        return apply("div", self, other)

    def __rtruediv__(self, other: Operand) -> Expr:
        return apply("div", other, self)

    def __floordiv__(self, other: Operand) -> Expr:
        return apply("floordiv", self, other)

    def __mod__(self, other: Operand) -> Expr:
        return apply("mod", self, other)

    def __pow__(self, other: Operand) -> Expr:
        return apply("pow", self, other)

    def __rpow__(self, other: Operand) -> Expr:
        return apply("pow", other, self)

    def __neg__(self) -> Expr:
        return apply("neg", self)

    def __abs__(self) -> Expr:
        return apply("abs", self)

    def __lt__(self, other: Operand) -> Expr:
        return apply("lt", self, other)

    def __le__(self, other: Operand) -> Expr:
        return apply("le", self, other)

    def __gt__(self, other: Operand) -> Expr:
        return apply("lt", other, self)

    def __ge__(self, other: Operand) -> Expr:
        return apply("le", other, self)

    def __and__(self, other: Operand) -> Expr:
        return apply("and", self, other)

    def __or__(self, other: Operand) -> Expr:
        return apply("or", self, other)

    def __rand__(self, other: Operand) -> Expr:
        return apply("and", other, self)

    def __ror__(self, other: Operand) -> Expr:
        return apply("or", other, self)

    def __invert__(self) -> Expr:
        return apply("not", self)

    @property
    def is_const(self) -> bool:
        return self.op == "const"

    def walk(self) -> Iterator[Expr]:
        """Yield every distinct sub-expression once, operands before the operations that use them."""
        seen: set[Expr] = set()
        stack = [(self, False)]
        while stack:
            node, ready = stack.pop()
            if ready:
                yield node
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack.extend((a, False) for a in reversed(node.args))

    def mentions(self, *leaves: Expr) -> bool:
        return any(node in leaves for node in self.walk())

    def symbols(self) -> frozenset[Expr]:
        return frozenset(node for node in self.walk() if node.op == "symbol")

    def tables(self) -> frozenset[str]:
        """The names of the run-time tables this reads."""
        return frozenset(str(node.value) for node in self.walk() if node.op == "table")

    def transform(self, change: Callable[[Expr], Expr]) -> Expr:
        """Rebuild bottom-up, passing every rebuilt sub-expression through `change`."""
        done: dict[Expr, Expr] = {}
        for node in self.walk():
            args = tuple(done[a] for a in node.args)
            done[node] = change(node if args == node.args else rebuild(node, args))
        return done[self]

    def substitute(self, replacements: Mapping[Expr, Expr]) -> Expr:
        """Replace sub-expressions, smallest first."""
        return self.transform(lambda node: replacements.get(node, node))


Operand = Expr | bool | int | float


def const(value: Scalar) -> Expr:
    if isinstance(value, bool):
        return Expr("const", (), value, Sort.BOOL)
    if isinstance(value, int):
        return Expr("const", (), value, Sort.INDEX)
    if math.isnan(value):
        raise AlgebraError("NaN is no constant of the algebra")
    return Expr("const", (), float(value) + 0.0, Sort.REAL)  # there is one zero


def lift(x: Operand) -> Expr:
    return x if isinstance(x, Expr) else const(x)


def symbol(name: str, sort: Sort) -> Expr:
    return Expr("symbol", (), name, sort)


def table(name: str, *at: Operand, sort: Sort = Sort.INDEX) -> Expr:
    """Read the run-time tensor `name` at `at`.

    A tensor with fewer axes than coordinates is read at the last ones; an index outside is moved to the border.
    """
    return Expr("table", tuple(lift(x) for x in at), name, sort)


def apply(op: str, *operands: Operand) -> Expr:
    """Apply one of `OPERATIONS`, checking the number and sorts of its operands."""
    rule, args = OPERATIONS[op], tuple(lift(x) for x in operands)
    if len(args) != rule.arity:
        raise AlgebraError(f"`{op}` takes {rule.arity} operands, not {len(args)}")
    if op == "where" and args[0].sort is not Sort.BOOL:
        raise AlgebraError(f"the condition of `where` must be a truth value, not {args[0].sort.value}")
    mixed = op in ("eq", "where") and len({a.sort is Sort.BOOL for a in args[-2:]}) > 1
    for arg in args:
        if arg.sort not in rule.takes or mixed:
            sorts = ", ".join(a.sort.value for a in args)
            raise AlgebraError(f"`{op}` cannot take operands of sorts ({sorts}); `where(c, 1, 0)` counts a truth value")
    return Expr(op, args, None, rule.result(args))


def rebuild(node: Expr, args: tuple[Expr, ...]) -> Expr:
    """The same operation or table over other operands."""
    return Expr("table", args, node.value, node.sort) if node.op == "table" else apply(node.op, *args)


def where(condition: Operand, yes: Operand, no: Operand) -> Expr:
    return apply("where", condition, yes, no)


def same(a: Operand, b: Operand) -> Expr:
    """Equality as an expression (`==` compares the expressions themselves)."""
    return apply("eq", a, b)


def minimum(a: Operand, b: Operand) -> Expr:
    return apply("min", a, b)


def maximum(a: Operand, b: Operand) -> Expr:
    return apply("max", a, b)


def exp(x: Operand) -> Expr:
    return apply("exp", x)


def log(x: Operand) -> Expr:
    return apply("log", x)


def sqrt(x: Operand) -> Expr:
    return apply("sqrt", x)


def tanh(x: Operand) -> Expr:
    return apply("tanh", x)


def sigmoid(x: Operand) -> Expr:
    return apply("sigmoid", x)


def ceil(x: Operand) -> Expr:
    return apply("ceil", x)


def floor(x: Operand) -> Expr:
    return apply("floor", x)


def real(x: Operand) -> Expr:
    """An index as a real number."""
    return apply("real", x)


def every(*conditions: Operand) -> Expr:
    """All of them hold; true when there are none."""
    result = true
    for c in conditions:
        result = lift(c) if result == true else result & c
    return result


def either(*conditions: Operand) -> Expr:
    """At least one of them holds; false when there are none."""
    result = false
    for c in conditions:
        result = lift(c) if result == false else result | c
    return result


true, false = const(True), const(False)
# `q` and `k` are positions; `i` is the query's index among the queries of this call, from 0.
b, h, kv, q, k, i = (symbol(name, Sort.INDEX) for name in ("b", "h", "kv", "q", "k", "i"))
heads, q_len, k_len, dim, layer, layers = (
    symbol(name, Sort.INDEX) for name in ("heads", "q_len", "k_len", "dim", "layer", "layers")
)
dot, q_norm, k_norm, score, peak, mass, acc = (
    symbol(name, Sort.REAL) for name in ("dot", "q_norm", "k_norm", "score", "peak", "mass", "acc")
)
# Of the keys that a query sees: how many they are, and the sum of their values.
seen, values = (symbol(name, Sort.REAL) for name in ("seen", "values"))
