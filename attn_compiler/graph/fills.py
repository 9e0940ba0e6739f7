"""Splits a score into what is seen and what it is, and says what a row gets that sees nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from attn_compiler.algebra.bounds import Box
from attn_compiler.algebra.expr import Expr, Sort, const, every, i, k, true
from attn_compiler.algebra.simplify import simplify
from attn_compiler.algebra.variant import EmptyRows
from attn_compiler.graph.symbolic_reading import combine

HIDES = -1e4  # weights of scores that much below the others are zero in every precision
_KEEPS_THE_SCORE, _ABSORBS = -1e5, -1e9  # what single precision makes of a fill that is added


@dataclass(frozen=True)
class Fill:
    """What the score of a hidden key is: `amount` in its place, or added to it."""

    amount: float
    replaces: bool

    @property
    def rows(self) -> EmptyRows | None:
        """What a row gets whose keys are all hidden so; None where rounding decides."""
        if self.amount == -math.inf:
            return EmptyRows.ZERO
        if self.replaces or self.amount <= _ABSORBS:
            return EmptyRows.MEAN
        return EmptyRows.UNMASKED if self.amount >= _KEEPS_THE_SCORE else None


@dataclass(frozen=True)
class Split:
    """`value` where `keep` holds, hidden by one of `fills` elsewhere."""

    keep: Expr
    value: Expr
    fills: tuple[Fill, ...]


def split(value: Expr, facts: Box) -> Split:
    """Take all conditions out of `value` under which it hides a key."""
    keep: list[Expr] = []
    fills: list[Fill] = []
    while True:
        found = next(_hiding(value), None)
        if found is None:
            return Split(simplify(every(*keep), facts), value, tuple(fills))
        condition, seen, fill = found
        keep.append(condition if seen else ~condition)
        fills.append(fill)
        value = assume(value, condition, seen)


def _hiding(value: Expr) -> Iterator[tuple[Expr, bool, Fill]]:
    """Conditions that decide whether `value` is far below all others, and which way they must fall for it not to be."""
    for choice in _choices(value):
        for seen in (True, False):
            fill = _fill(assume(value, choice.args[0], not seen))
            if fill is not None:
                yield choice.args[0], seen, fill


def _choices(value: Expr) -> Iterator[Expr]:
    """Choices that decide a term of the whole."""
    if value.op == "where":
        yield value
    if value.op in ("add", "sub", "mul", "where"):
        for part in value.args:
            if part.sort is not Sort.BOOL:
                yield from _choices(part)


def _fill(hidden: Expr) -> Fill | None:
    constant, rest = 0.0, False
    for term, sign in _terms(hidden, 1):
        if term.is_const:
            constant += sign * float(term.value)  # type: ignore[arg-type]
        elif _may_be_huge(term):
            return None
        else:
            rest = True
    return Fill(constant, not rest) if constant <= HIDES else None


def _terms(e: Expr, sign: int) -> Iterator[tuple[Expr, int]]:
    if e.op in ("add", "sub"):
        yield from _terms(e.args[0], sign)
        yield from _terms(e.args[1], sign if e.op == "add" else -sign)
    else:
        yield e, sign


def _may_be_huge(term: Expr) -> bool:
    """Whether a constant in `term` could make up for a fill."""
    constants = [float(x.value) for x in term.walk() if x.is_const and x.sort is Sort.REAL]  # type: ignore[arg-type]
    return any(x >= -HIDES for x in constants)


def assume(e: Expr, condition: Expr, truth: bool) -> Expr:
    """`e` where `condition` is known; choices collapse, and sums and products with them."""

    def change(node: Expr) -> Expr:
        if node.op == "where" and node.args[0] == condition:
            return node.args[1] if truth else node.args[2]
        if node.op == "mul" and any(x.is_const and x.value == 0 for x in node.args):
            return const(0.0)
        return combine(node.op, *node.args) if node.op in ("add", "sub", "mul") and node.sort is Sort.REAL else node

    return e.transform(change)


def empty_rows(found: Split, facts: Box) -> EmptyRows | None:
    """What a row gets that sees no key; None where no one answer holds for all of them."""
    if not found.fills or never_empty(found.keep, facts):
        return EmptyRows.ZERO
    kinds = {fill.rows for fill in found.fills}
    if kinds == {EmptyRows.ZERO} or len(found.fills) == 1:
        return found.fills[0].rows
    return EmptyRows.MEAN if len(set(found.fills)) == 1 and found.fills[0].replaces else None


def never_empty(keep: Expr, facts: Box) -> bool:
    """Whether every query provably sees some key: itself, the first, or the last."""
    if simplify(keep, facts) == true:
        return True
    candidates = [const(0), i] if facts[i].hi <= facts[k].hi and math.isfinite(facts[k].hi) else [const(0)]
    if facts[k].hi == facts[k].lo:
        candidates.append(const(int(facts[k].lo)))
    if math.isfinite(facts[k].hi) and facts[k].hi > facts[i].hi:
        candidates.append(i + int(facts[k].hi - facts[i].hi))
    return any(simplify(keep.substitute({k: at}), facts) == true for at in candidates)
