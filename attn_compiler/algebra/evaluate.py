"""Evaluates an expression over anything: numbers, intervals, arrays, or the text of a program."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from attn_compiler.algebra.expr import Expr, Scalar
from attn_compiler.errors import TableError

T = TypeVar("T")
Table = Sequence["Table | Scalar"] | Callable[..., Scalar]


def evaluate(e: Expr, leaf: Callable[[Expr, tuple[T, ...]], T], operations: Mapping[str, Callable[..., T]]) -> T:
    """Evaluate every shared sub-expression once; `leaf` gives constants, symbols and tables read at evaluated places."""
    done: dict[Expr, T] = {}
    for node in e.walk():
        args = tuple(done[a] for a in node.args)
        done[node] = leaf(node, args) if node.op in ("const", "symbol", "table") else operations[node.op](*args)
    return done[e]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


# What every operation means on plain numbers; `//` and `%` round down, as Python's do.
PYTHON: Mapping[str, Callable[..., Scalar]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "div": lambda a, b: a / b,
    "pow": lambda a, b: float(a) ** b,
    "min": min,
    "max": max,
    "neg": lambda a: -a,
    "abs": abs,
    "exp": _exp,
    "log": math.log,
    "sqrt": math.sqrt,
    "tanh": math.tanh,
    "sigmoid": _sigmoid,
    "real": float,
    "ceil": math.ceil,
    "floor": math.floor,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "eq": lambda a, b: a == b,
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
    "not": lambda a: not a,
    "where": lambda c, a, b: a if c else b,
}


def evaluate_scalar(e: Expr, env: Mapping[Expr, Scalar], tables: Mapping[str, Table] | None = None) -> Scalar:
    """Evaluate at one place, where symbols have the values of `env` and tables are nested sequences or functions."""

    def leaf(node: Expr, at: tuple[Scalar, ...]) -> Scalar:
        if node.op == "const":
            return node.value  # type: ignore[return-value]
        if node.op == "symbol":
            return env[node]
        return read(str(node.value), (tables or {}), at)

    return evaluate(e, leaf, PYTHON)


def read(name: str, tables: Mapping[str, Table], at: Sequence[Scalar]) -> Scalar:
    """Read a table at its last coordinates, an index outside being moved to the border."""
    if name not in tables:
        raise TableError(f'the table "{name}" is missing; given: {", ".join(sorted(tables)) or "none"}')
    found: object = tables[name]
    if callable(found):
        return found(*at)  # type: ignore[no-any-return]
    depth, inner = 0, found
    while isinstance(inner, Sequence):
        depth, inner = depth + 1, inner[0] if inner else None
    for index in at[len(at) - depth :]:
        assert isinstance(found, Sequence)
        found = found[min(max(int(index), 0), len(found) - 1)]
    return found  # type: ignore[return-value]
