"""Symbolic derivatives: what the backward pass of every kernel is made of."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, Sort, const, exp, log, sigmoid, sqrt, where
from attn_compiler.algebra.simplify import simplify
from attn_compiler.errors import AlgebraError

_ZERO, _ONE = const(0.0), const(1.0)


def derivative(e: Expr, leaf: Expr) -> Expr:
    """d e / d leaf. At a kink (min, max, abs, where) it is that of the side `e` takes there, the first one when equal."""
    slopes: dict[Expr, Expr] = {}
    for node in e.walk():
        if node == leaf:
            slopes[node] = _ONE
        elif node.sort is not Sort.REAL or not any(slopes.get(a, _ZERO) != _ZERO for a in node.args):
            slopes[node] = _ZERO
        else:
            slopes[node] = simplify(_chain(node, tuple(slopes[a] for a in node.args)))
    return slopes[e]


def _chain(e: Expr, d: tuple[Expr, ...]) -> Expr:
    a = e.args
    match e.op:
        case "add":
            return d[0] + d[1]
        case "sub":
            return d[0] - d[1]
        case "mul":
            return d[0] * a[1] + a[0] * d[1]
        case "div":
            return d[0] / a[1] - d[1] * e / a[1]
        case "pow":
            return _power(e, d)
        case "neg":
            return -d[0]
        case "abs":
            return where(a[0] < 0, -d[0], d[0])
        case "min":
            return where(a[0] <= a[1], d[0], d[1])
        case "max":
            return where(a[1] <= a[0], d[0], d[1])
        case "where":
            return where(a[0], d[1], d[2])
        case "exp":
            return d[0] * exp(a[0])
        case "log":
            return d[0] / a[0]
        case "sqrt":
            return d[0] * 0.5 / sqrt(a[0])
        case "tanh":
            return d[0] * (1.0 - e * e)
        case "sigmoid":
            return d[0] * sigmoid(a[0]) * (1.0 - sigmoid(a[0]))
    raise AlgebraError(f"`{e.op}` has no derivative")


def _power(e: Expr, d: tuple[Expr, ...]) -> Expr:
    base, exponent = e.args
    slope = d[0] * exponent * base ** (exponent - 1)
    return slope if d[1] == _ZERO else slope + d[1] * e * log(base)
