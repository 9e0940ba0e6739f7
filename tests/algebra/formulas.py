"""Random formulas of the algebra, and places to evaluate them at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hypothesis import strategies as st

from attn_compiler.algebra.bounds import Interval
from attn_compiler.algebra.evaluate import Table
from attn_compiler.algebra.expr import Expr, Scalar, Sort, apply, b, const, h, k, q, symbol, table

x, y = symbol("x", Sort.REAL), symbol("y", Sort.REAL)
flag = table("flag", b, q, sort=Sort.BOOL)
LEAVES: Mapping[Sort, tuple[Expr, ...]] = {
    Sort.BOOL: (flag, table("flag", b, k, sort=Sort.BOOL), table("shown", k, sort=Sort.BOOL)),
    Sort.INDEX: (q, k, h, table("document", b, q), table("document", b, k)),
    Sort.REAL: (x, y, table("slope", h, sort=Sort.REAL)),
}


@dataclass(frozen=True)
class Place:
    """A value for every symbol, and every table."""

    env: Mapping[Expr, Scalar]
    tables: Mapping[str, Table]

    def box(self, slack: Mapping[Expr, tuple[int, int]]) -> dict[Expr, Interval]:
        """Intervals around the values of some symbols; nothing is known of the others."""
        return {leaf: Interval(self.env[leaf] - below, self.env[leaf] + above) for leaf, (below, above) in slack.items()}


_small = st.integers(-9, 9)
_reals = st.integers(-24, 24).map(lambda n: n / 8)


@st.composite
def _places(draw: st.DrawFn) -> Place:
    env: dict[Expr, Scalar] = {leaf: draw(_small) for leaf in (q, k, h)}
    env |= {b: draw(st.integers(0, 1)), x: draw(_reals), y: draw(_reals)}
    flags = st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=2, max_size=2)
    documents = st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=2, max_size=2)
    rows: dict[str, Table] = {"flag": draw(flags), "document": draw(documents)}
    rows["shown"] = draw(st.lists(st.booleans(), min_size=6, max_size=6))
    rows["slope"] = draw(st.lists(_reals, min_size=2, max_size=2))
    return Place(env, rows)


places = _places()
slacks = st.fixed_dictionaries({}, optional={leaf: st.tuples(st.integers(0, 4), st.integers(0, 4)) for leaf in (q, k, h, x, y)})

_constants: Mapping[Sort, st.SearchStrategy[Expr]] = {
    Sort.BOOL: st.booleans().map(const),
    Sort.INDEX: _small.map(const),
    Sort.REAL: _reals.map(const),
}
_divisors = st.integers(1, 6).map(const)
# What is defined everywhere, so that a random formula has a value everywhere.
_TOTAL_REAL_FUNCTIONS = ("neg", "abs", "tanh", "sigmoid")


def _of(op: str, *operands: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    return st.tuples(*operands).map(lambda args: apply(op, *args))


def leaves(sort: Sort) -> st.SearchStrategy[Expr]:
    return st.one_of(st.sampled_from(LEAVES[sort]), _constants[sort])


def formulas(sort: Sort, depth: int = 4) -> st.SearchStrategy[Expr]:
    """Well-sorted formulas that have a finite value at every place."""
    return _FORMULAS[sort][depth]


def _deeper(sort: Sort, below: Mapping[Sort, st.SearchStrategy[Expr]]) -> st.SearchStrategy[Expr]:
    truth, index, number = below[Sort.BOOL], below[Sort.INDEX], below[Sort.REAL]
    one = below[sort]
    either = [leaves(sort), _of("where", truth, one, one)]
    match sort:
        case Sort.BOOL:
            either += [_of(op, one, one) for op in ("and", "or", "and", "or", "eq")] + [_of("not", one)]
            either += [_of(op, index, index) for op in ("lt", "le", "lt", "le", "eq")]
            either += [_of(op, number, st.one_of(number, index)) for op in ("lt", "le")]
        case Sort.INDEX:
            either += [_of(op, one, one) for op in ("add", "sub", "mul", "min", "max")]
            either += [_of(op, one, _divisors) for op in ("floordiv", "mod")] + [_of("neg", one), _of("abs", one)]
            either += [_of(op, number) for op in ("floor", "ceil")]
            either += [st.builds(lambda at: table("document", b, at), one)]
        case Sort.REAL:
            either += [_of(op, one, st.one_of(one, index)) for op in ("add", "sub", "mul", "min", "max")]
            either += [_of(op, one) for op in _TOTAL_REAL_FUNCTIONS] + [_of("real", index)]
            either += [_of("where", truth, index, one), _of("where", truth, one, index)]
            either += [_of("div", one, _divisors), _of("pow", one, st.sampled_from([const(1), const(2), const(2.0)]))]
            either += [_of("exp", _of("tanh", one)), _of("sqrt", _of("abs", one))]
    return st.one_of(*either)


def _all_depths(deepest: int) -> Mapping[Sort, list[st.SearchStrategy[Expr]]]:
    found = {sort: [leaves(sort)] for sort in Sort}
    for _ in range(deepest):
        below = {sort: strategies[-1] for sort, strategies in found.items()}
        for sort in Sort:
            found[sort].append(_deeper(sort, below))
    return found


_FORMULAS = _all_depths(5)
