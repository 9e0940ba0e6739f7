"""Reads operations that look values up at computed places, and running sums."""

from __future__ import annotations

from torch import fx

from attn_compiler.algebra.expr import Expr, const, where
from attn_compiler.graph.calls import is_one, shape
from attn_compiler.graph.symbolic_reading import Index, OpaqueError, Reading, Rules, as_number, cast, combine


def _index(r: Reading) -> Expr:
    """Advanced indexing: the indices are broadcast against each other and replace the dimensions they index."""
    source = r.tensor("self")
    given: list[fx.Node | None] = list(r.call["indices"])
    sizes = shape(source)
    given += [None] * (len(sizes) - len(given))
    used = [n for n, x in enumerate(given) if x is not None]
    if not used or any(len(shape(x)) > 0 and str(x.meta["val"].dtype) == "torch.bool" for x in given if x is not None):
        raise OpaqueError
    width = max(len(shape(given[n])) for n in used)
    together = used == list(range(used[0], used[-1] + 1))
    begin = used[0] if together else 0
    shared, rest = r.index[begin : begin + width], iter(r.index[:begin] + r.index[begin + width :])
    at = [next(rest) if x is None else _looked_up(r, x, shared, n) for n, x in enumerate(given)]
    return r.at(source, tuple(at))


def _looked_up(r: Reading, index: fx.Node, shared: Index, dim: int) -> Expr:
    sizes = shape(index)
    mine = shared[len(shared) - len(sizes) :]
    at = r.at(index, tuple(const(0) if is_one(size) else x for size, x in zip(sizes, mine, strict=True)))
    return _wrapped(r, at, r.reader.number(shape(r.tensor("self"))[dim]))


def _wrapped(r: Reading, at: Expr, size: Expr) -> Expr:
    """A negative index counts from the end."""
    return r.reader.simplified(where(at < 0, at + size, at))


def _gather(r: Reading) -> Expr:
    dim = r.dim("dim", r.rank)
    return r.at(r.tensor("self"), r.moved(dim, r.at(r.tensor("index"), r.index)))


def _index_select(r: Reading) -> Expr:
    dim = r.dim("dim", r.rank)
    return r.at(r.tensor("self"), r.moved(dim, r.at(r.tensor("index"), (r.index[dim],))))


def _embedding(r: Reading) -> Expr:
    return r.at(r.tensor("weight"), (r.at(r.tensor("indices"), r.index[:-1]), r.index[-1]))


def _cumsum(r: Reading) -> Expr:
    """A running sum of what does not depend on the place is a product."""
    source, dim = r.tensor("self"), r.dim("dim", r.rank)
    place = r.reader.fresh(shape(source)[dim])
    value = r.reader.simplified(as_number(r.at(source, (*r.index[:dim], place, *r.index[dim + 1 :]))))
    if value.mentions(place):
        raise OpaqueError
    return cast(combine("mul", value, r.index[dim] + 1), r.dtype)


def _diff(r: Reading) -> Expr:
    source, dim, before = r.tensor("self"), r.dim("dim", r.rank), r.call.get("prepend")
    if r.call.get("n", 1) != 1 or r.call.get("append") is not None:
        raise OpaqueError
    here = r.index[dim]
    if before is None:
        return combine("sub", r.at(source, r.moved(dim, here + 1)), r.at(source, r.index))
    if not is_one(shape(before)[dim]):
        raise OpaqueError
    inner = combine("sub", r.at(source, r.index), r.at(source, r.moved(dim, here - 1)))
    first = r.moved(dim, const(0))
    outer = combine("sub", r.at(source, first), r.at(before, first))
    return where(here <= 0, r.reader.simplified(outer), r.reader.simplified(inner))


INDEXING: Rules = {
    "index": _index,
    "gather": _gather,
    "index_select": _index_select,
    "embedding": _embedding,
    "cumsum": _cumsum,
    "diff": _diff,
}
