"""Names the parts of a recovered variant, for people and for planning; every name is proved by rebuilding the part from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from attn_compiler.algebra.bounds import Box
from attn_compiler.algebra.expr import Expr, Sort, b, i, k, q, same, score
from attn_compiler.algebra.linear import Linear, expression, linear
from attn_compiler.algebra.simplify import conjuncts, disjuncts, simplify

LONGEST = 48  # a name; reports put it in front of what it names
_UNNAMED = "condition"


@dataclass(frozen=True)
class Named:
    """A part of a variant and what it is called."""

    name: str
    part: Expr


def classify(mask: Expr, value: Expr, facts: Box) -> tuple[Named, ...]:
    """A name for every condition of the mask and every term that is added to the score."""
    conditions = [Named(_condition(part, facts), part) for part in _paired(mask)]
    return (*conditions, *(Named(_term(term), term) for term in _terms(value) if term != score))


def _indexed(part: Expr) -> Expr:
    """The same, where queries that are known by their positions alone are as if those were their indices."""
    return part.substitute({q: i}) if part.mentions(q) and not part.mentions(i) else part


def _condition(part: Expr, facts: Box) -> str:
    part = _indexed(part)
    for recognize in (_bound, _documents, _padding, _chunk):
        found = recognize(part)
        if found is not None and simplify(found[1], facts) == simplify(part, facts):
            return found[0]
    if part.op == "or":
        inner = [_condition(x, facts) for x in disjuncts(part)]
        either = _joined(inner, " or ", part)
        return f"prefix ({either})" if "causal" in inner and either != _unnamed(part) else either
    if part.op == "and":
        return _two_sided(part) or _joined([_condition(x, facts) for x in _paired(part)], " and ", part)
    if part.op == "table" and part.mentions(i) and part.mentions(k):
        return "dense table"
    return _unnamed(part)


def _joined(names: list[str], word: str, part: Expr) -> str:
    """The names of its operands, if all of them have one, and it is short."""
    name = word.join(names)
    return name if len(name) <= LONGEST and _UNNAMED not in name else _unnamed(part)


def _unnamed(part: Expr) -> str:
    return f"{_UNNAMED} on tables" if part.tables() else f"{_UNNAMED} on places"


def _paired(mask: Expr) -> list[Expr]:
    """The conditions of a mask, where the two sides of a window, as far ahead as back, are one condition."""
    parts = list(conjuncts(mask))
    for part in parts:
        other = next((x for x in parts if _two_sided(part & x)), None)
        if other is not None:
            return [part & other, *(x for x in parts if x not in (part, other))]
    return parts


def _two_sided(part: Expr) -> str:
    """`k <= i + n - 1` and `i <= k + n - 1` are `window(n)`."""
    sides = [_bound(_indexed(side)) for side in part.args] if part.op == "and" else []
    names = [found[0] for found in sides if found]
    for ahead, back in (names, names[::-1]) if len(names) == 2 else ():
        n = back.removeprefix("window(").removesuffix(")")
        if n.isdigit() and n != back and ahead == ("causal" if n == "1" else f"causal({int(n) - 1})"):
            return back
    return ""


Found = tuple[str, Expr] | None


def _bound(part: Expr) -> Found:
    """`k <= i + offset`, `i <= k + n - 1`, or a limit on keys."""
    if part.op != "le" or any(x.sort is not Sort.INDEX for x in part.args):
        return None
    difference = linear(part.args[0]) - linear(part.args[1])
    rest = {a: n for a, n in difference.factors.items() if a not in (i, k)}
    ik = difference.factors.get(i, 0), difference.factors.get(k, 0)
    if not rest and ik == (0, 1):
        return f"sinks({1 - difference.constant})", k <= -difference.constant
    if not rest and ik == (-1, 1):
        offset = -difference.constant
        return ("causal" if offset == 0 else f"causal({offset})"), k <= i + offset
    if not rest and ik == (1, -1):
        left = 1 - difference.constant
        return f"window({left})", i < k + left
    remapped = [a for a in rest if a.op == "table"]
    if len(rest) == 2 == len(remapped) and {rest[a] for a in rest} == {1, -1} and ik == (0, 0):
        return _remapped(part, rest)
    if ik == (0, 1) and not any(a.mentions(i, k) for a in rest):
        return "length of keys", part
    if ik == (0, 1) and len(remapped) == 1:
        return "causal on given positions", part
    return None


def _remapped(part: Expr, rest: dict[Expr, int]) -> Found:
    above, below = (next(a for a in rest if rest[a] == sign) for sign in (1, -1))
    if above.substitute({k: i}) == below and above.mentions(k):
        return "causal on remapped positions", part
    return ("window on remapped positions", part) if below.substitute({k: i}) == above and below.mentions(k) else None


def label(part: Expr) -> Expr | None:
    """The formula, read at the key, of a condition that says it is the same at the query."""
    part = _indexed(part)
    if part.op != "eq":
        return None
    if part.args[0].sort is Sort.INDEX:  # canonically, a difference that is zero
        both = linear(part.args[0]) - linear(part.args[1])
        mine = Linear({atom: n for atom, n in both.factors.items() if atom.mentions(i)})
        other = Linear({atom: -n for atom, n in both.factors.items() if atom.mentions(k)})
        read = expression(other if sum(other.factors.values()) > 0 else other * -1)
        alike = simplify(expression(mine).substitute({i: k})) == simplify(expression(other))
        return read if alike and both == mine - other and not read.mentions(i) else None
    for one, same_at_key in (part.args, part.args[::-1]):
        if one.mentions(i) and not one.mentions(k) and one.substitute({i: k}) == same_at_key:
            return same_at_key
    return None


def _documents(part: Expr) -> Found:
    """Both sides are one formula, read at the query and at the key."""
    found = label(part) if part.tables() else None
    return ("documents", same(found.substitute({k: i}), found)) if found is not None else None


def _padding(part: Expr) -> Found:
    return ("padding", part) if part.tables() and part.symbols() <= {b, k} and part.mentions(k) else None


def _chunk(part: Expr) -> Found:
    if part.op != "eq" or part.tables():
        return None
    for mine, other in (part.args, part.args[::-1]):
        if mine.op == "floordiv" and mine.mentions(i) and mine.substitute({i: k}) == other:
            return f"chunks({mine.args[1].value})", same(mine, other)
    return None


def _terms(value: Expr) -> Iterator[Expr]:
    if value.op in ("add", "sub"):
        for part in value.args:
            yield from _terms(part)
    else:
        yield value


_SHAPES: tuple[tuple[str, Callable[[Expr], bool]], ...] = (
    ("function of the score", lambda e: e.mentions(score)),
    ("regions", lambda e: e.op == "where" and label(e.args[0]) is not None),
    ("ALiBi", lambda e: e.mentions(k) and all(not x.mentions(k) for x in e.walk() if x.op == "table") and not e.mentions(b)),
    ("relative table", lambda e: any(_is_relative(x) for x in e.walk() if x.op == "table")),
    ("bias table", lambda e: any(x.op == "table" and x.mentions(i) and x.mentions(k) for x in e.walk())),
    ("padding", lambda e: e.symbols() <= {b, k}),
)


def _term(term: Expr) -> str:
    return next((name for name, fits in _SHAPES if fits(term)), "bias")


def _is_relative(read: Expr) -> bool:
    """Read at a distance: moving query and key by one place changes nothing."""
    moved = read.transform(lambda e: e + 1 if e in (i, k) else e)
    return read.mentions(i) and read.mentions(k) and simplify(moved) == simplify(read)
