"""How far a mask reaches: bounds on q - k that hold wherever it is true, besides a few first keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr

ANYWHERE, NOWHERE = (-math.inf, math.inf), (math.inf, -math.inf)
Band = tuple[float, float]  # the least and the greatest q - k


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
    for prefix in sorted({0} | {bound for node in mask.walk() if (bound := _first_keys(node)) is not None}):
        nearest, farthest = band(mask.transform(lambda node, n=prefix: _beyond(node, n)))  # type: ignore[misc]
        if math.isfinite(farthest - nearest):
            return Reach(int(nearest), int(farthest), prefix)
    return None


def band(mask: Expr) -> Band:
    """Bounds on q - k wherever `mask` holds."""
    match mask.op:
        case "const":
            return ANYWHERE if mask.value else NOWHERE
        case "and":
            (a, b), (c, d) = map(band, mask.args)
            return max(a, c), min(b, d)
        case "or":
            parts = [part for part in map(band, mask.args) if part[0] <= part[1]]
            return (min(p[0] for p in parts), max(p[1] for p in parts)) if parts else NOWHERE
        case "not":
            return _band_of_negation(mask.args[0])
        case "lt" | "le" | "eq":
            return _band_of_comparison(mask)
    return ANYWHERE


def is_causal(mask: Expr) -> bool:
    """Whether `mask` is k <= q and nothing else."""
    return mask.op in ("lt", "le") and _band_of_comparison(mask) == (0, math.inf)


def holds(mask: Expr) -> bool:
    """Whether `mask` is true whatever the coordinates are, as far as comparing linear terms can tell."""
    match mask.op:
        case "const":
            return mask.value is True
        case "and":
            return all(map(holds, mask.args))
        case "or":
            return any(map(holds, mask.args))
        case "lt" | "le" | "eq":
            terms, constant = linear(mask.args[0] - mask.args[1]) or ({e.q: 1}, 0)
            return not terms and {"lt": constant < 0, "le": constant <= 0, "eq": constant == 0}[mask.op]
    return False


def linear(x: Expr) -> tuple[dict[Expr, int], int] | None:
    """`x` as integer multiples of symbols plus a constant."""
    if x.op == "const" and isinstance(x.value, int):
        return {}, x.value
    if x.op == "symbol" and x.sort is e.Sort.INDEX:
        return {x: 1}, 0
    parts = [linear(a) for a in x.args]
    if x.op not in ("add", "sub", "neg", "mul") or None in parts:
        return None
    (terms, constant), (others, offset) = parts[0] or ({}, 0), parts[-1] or ({}, 0)
    if x.op == "mul":
        if others and terms:
            return None
        factor, terms, constant = (offset, terms, constant) if not others else (constant, others, offset)
        return _combine({}, 0, terms, constant, factor)
    if x.op == "neg":
        return _combine({}, 0, terms, constant, -1)
    return _combine(terms, constant, others, offset, 1 if x.op == "add" else -1)


def _combine(
    terms: dict[Expr, int], constant: int, others: dict[Expr, int], offset: int, factor: int
) -> tuple[dict[Expr, int], int]:
    total = {s: terms.get(s, 0) + factor * others.get(s, 0) for s in terms | others}
    return {s: n for s, n in total.items() if n}, constant + factor * offset


def _band_of_negation(x: Expr) -> Band:
    match x.op:
        case "const":
            return band(e.const(not x.value))
        case "not":
            return band(x.args[0])
        case "and" | "or":
            left, right = (~a for a in x.args)
            return band(left | right if x.op == "and" else left & right)
        case "lt":
            return band(x.args[1] <= x.args[0])
        case "le":
            return band(x.args[1] < x.args[0])
    return ANYWHERE


def _band_of_comparison(x: Expr) -> Band:
    difference = linear(x.args[0] - x.args[1])
    if difference is None or difference[0] not in ({e.q: 1, e.k: -1}, {e.q: -1, e.k: 1}):
        return ANYWHERE
    sign, constant = difference[0][e.q], difference[1]
    limit = -constant - (x.op == "lt")  # sign · (q - k) <= limit
    upper, lower = (limit, -math.inf) if sign == 1 else (math.inf, -limit)
    return (-sign * constant, -sign * constant) if x.op == "eq" else (lower, upper)


def _first_keys(node: Expr) -> int | None:
    """n where `node` is true of no key from n on."""
    if node.op not in ("lt", "le", "eq"):
        return None
    terms, constant = linear(node.args[0] - node.args[1]) or ({}, 0)
    if set(terms) != {e.k} or abs(terms[e.k]) != 1 or (node.op != "eq" and terms[e.k] != 1):
        return None
    return max(0, -terms[e.k] * constant + (node.op != "lt"))


def _beyond(node: Expr, prefix: int) -> Expr:
    """What is left of `node` for keys from `prefix` on."""
    bound = _first_keys(node)
    return e.false if bound is not None and bound <= prefix else node
