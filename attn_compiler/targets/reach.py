"""How far a mask reaches: bounds on q - k that hold wherever it is true, besides a few first keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.bounds import Occupancy, distance, occupancy
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.linear import linear


@dataclass(frozen=True)
class Reach:
    """A mask shows key k to query q only where `nearest <= q - k <= farthest`, or where `k < prefix`."""

    nearest: int
    farthest: int
    prefix: int

    @property
    def width(self) -> int:
        return self.farthest - self.nearest


def reach(mask: Expr) -> Reach | None:
    """The reach of a mask, with the shortest prefix that bounds it; None where no prefix does."""
    firsts = {bound for node in mask.walk() if (bound := _first_keys(node)) is not None}
    for prefix in sorted({0} | firsts):
        nearest, farthest = distance(beyond(mask, prefix))
        if math.isfinite(farthest - nearest):
            return Reach(math.ceil(nearest), math.floor(farthest), prefix)
    return None


@dataclass(frozen=True)
class Sides:
    """The same where a side may be open: `nearest` or `farthest` is infinite, then."""

    nearest: float
    farthest: float
    prefix: int = 0

    @property
    def bounded(self) -> bool:
        """Whether one of the sides is closed."""
        return math.isfinite(self.nearest) or math.isfinite(self.farthest)


def sides(mask: Expr) -> Sides:
    """How far a mask reaches to either side."""
    closed = reach(mask)
    if closed:
        return Sides(closed.nearest, closed.farthest, closed.prefix)
    nearest, farthest = distance(mask)
    return Sides(nearest, farthest) if nearest <= farthest else Sides(-math.inf, math.inf)


def is_causal(mask: Expr) -> bool:
    """Whether `mask` is k <= q and nothing else."""
    return mask.op in ("lt", "le") and distance(mask) == (0, math.inf)


def shows_itself(mask: Expr) -> bool:
    """Whether every query provably sees the key at its own position."""
    return occupancy(mask.substitute({e.k: e.q}), {}) is Occupancy.FULL


def _first_keys(node: Expr) -> int | None:
    """n where `node` is true of no key from n on."""
    if node.op not in ("lt", "le", "eq") or any(a.sort is not Sort.INDEX for a in node.args):
        return None
    difference = linear(node.args[0]) - linear(node.args[1])
    factor = difference.factors.get(e.k, 0)
    if len(difference.factors) != 1 or abs(factor) != 1 or (node.op != "eq" and factor != 1):
        return None
    return max(0, -factor * difference.constant + (node.op != "lt"))


def beyond(mask: Expr, prefix: int) -> Expr:
    """What is left of `mask` for keys from `prefix` on."""

    def change(node: Expr) -> Expr:
        bound = _first_keys(node)
        return e.false if bound is not None and bound <= prefix else node

    return mask.transform(change)
