"""Canonical truth: "and" and "or" without order, repetition, or parts that follow from others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, reduce

from attn_compiler.algebra.bounds import Box
from attn_compiler.algebra.expr import Expr, apply, const, false, true
from attn_compiler.algebra.linear import Linear, at_most_zero, is_index, linear
from attn_compiler.algebra.notation import text

_Shape = tuple[tuple[Expr, int], ...]


def conjunction(parts: Iterable[Expr], facts: Box) -> Expr:
    """All of the canonical `parts` hold."""
    return _joined("and", parts, facts)


def disjunction(parts: Iterable[Expr], facts: Box) -> Expr:
    """Some of the canonical `parts` hold."""
    return _joined("or", parts, facts)


@lru_cache(maxsize=1 << 16)
def negation(e: Expr) -> Expr:
    """Not `e`, with negations only in front of what cannot be turned around."""
    match e.op:
        case "const":
            return const(not e.value)
        case "not":
            return e.args[0]
        case "and":
            return disjunction(map(negation, flat("and", (e,))), {})
        case "or":
            return conjunction(map(negation, flat("or", (e,))), {})
        case "lt":
            return apply("le", e.args[1], e.args[0])
        case "le" if is_index(*e.args):
            return at_most_zero((linear(e.args[1]) - linear(e.args[0])).plus(1))
        case "le":
            return apply("lt", e.args[1], e.args[0])
    return ~e


def flat(op: str, parts: Iterable[Expr]) -> tuple[Expr, ...]:
    """The operands of nested operations of one kind, each once."""
    seen: dict[Expr, None] = {}
    stack = list(reversed(list(parts)))
    while stack:
        part = stack.pop()
        if part not in seen:
            seen[part] = None
            stack.extend(reversed(part.args) if part.op == op else ())
    return tuple(part for part in seen if part.op != op)


def _joined(op: str, parts: Iterable[Expr], facts: Box) -> Expr:
    neutral, decisive = (true, false) if op == "and" else (false, true)
    operands = [part for part in flat(op, parts) if part != neutral]
    if decisive not in operands:
        operands = _tightest(op, operands)
    known = set(operands)
    if decisive in known or any(negation(part) in known for part in operands):
        return decisive
    shorter = _absorbed("or" if op == "and" else "and", operands, facts)
    if shorter != operands:
        return _joined(op, shorter, facts)
    if not operands:
        return neutral
    return reduce(lambda a, b: apply(op, a, b), sorted(operands, key=text))


def _absorbed(other: str, parts: list[Expr], facts: Box) -> list[Expr]:
    """`a & (a | b)` is `a`, and so is `a | (a & b)`; and `a & (~a | b)` is `a & b`."""
    single = set(parts)
    kept = []
    for part in parts:
        if part.op != other:
            kept.append(part)
            continue
        inner = flat(other, (part,))
        if any(x in single for x in inner):
            continue
        open_ = [x for x in inner if negation(x) not in single]
        kept.append(part if len(open_) == len(inner) else _joined(other, open_, facts))
    return list(dict.fromkeys(kept))


def _tightest(op: str, parts: list[Expr]) -> list[Expr]:
    """Of several bounds on one sum, the one that decides; `false` in an "and" (`true` in an "or") where two of them clash."""
    limits: dict[_Shape, int] = {}
    pick: Callable[[int, int], int] = max if op == "and" else min
    others = []
    for part in parts:
        bound = _bound(part)
        if bound is None:
            others.append(part)
            continue
        shape, constant = bound
        limits[shape] = pick(limits[shape], constant) if shape in limits else constant
    for shape, constant in limits.items():
        opposite = limits.get(_opposite(shape))
        if opposite is None:
            continue
        if op == "and" and constant + opposite > 0:
            return [false]
        if op == "or" and constant + opposite <= 1:
            return [true]
    return others + [at_most_zero(Linear(dict(shape), constant)) for shape, constant in limits.items()]


def _bound(part: Expr) -> tuple[_Shape, int] | None:
    """A comparison of indices as a sum and the constant that with it is at most zero."""
    if part.op != "le" or not is_index(*part.args):
        return None
    difference = linear(part.args[0]) - linear(part.args[1])
    return difference.terms, difference.constant


def _opposite(shape: _Shape) -> _Shape:
    return tuple((atom, -n) for atom, n in shape)
