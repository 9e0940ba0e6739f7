"""Reads operations that only move values: where a place of the result comes from."""

from __future__ import annotations

from attn_compiler.algebra.expr import Expr, const, every, where
from attn_compiler.graph.calls import Argument, Size, equal, is_one, shape
from attn_compiler.graph.symbolic_reading import Index, OpaqueError, Reading, Rule, Rules, cast, combine


def _same(r: Reading) -> Expr:
    return r.at(r.tensor("self"), r.index)


def _expand(r: Reading) -> Expr:
    return r.at(r.tensor("self"), r.broadcast(r.tensor("self")))


def _unsqueeze(r: Reading) -> Expr:
    dim = r.dim("dim", r.rank)
    return r.at(r.tensor("self"), r.index[:dim] + r.index[dim + 1 :])


def _permuted(order: tuple[int, ...], r: Reading) -> Expr:
    source = dict(zip((dim % r.rank for dim in order), r.index, strict=True))
    return r.at(r.tensor("self"), tuple(source[dim] for dim in range(r.rank)))


def _swapped(a: int, b: int, r: Reading) -> Expr:
    order = list(range(r.rank))
    order[a], order[b] = order[b], order[a]
    return _permuted(tuple(order), r)


def _movedim(r: Reading) -> Expr:
    def places(name: str) -> list[int]:
        given = r.call[name]
        return [x % r.rank for x in ([given] if isinstance(given, int) else given)]

    moved = dict(zip(places("destination"), places("source"), strict=True))
    rest = iter(x for x in range(r.rank) if x not in moved.values())
    return _permuted(tuple(moved[x] if x in moved else next(rest) for x in range(r.rank)), r)


def _view(r: Reading) -> Expr:
    """Dimensions that split or merge are grouped; inside a group, places are counted."""
    source = r.tensor("self")
    if "dtype" in r.call.arguments and r.call.get("dtype") is not None:
        raise OpaqueError
    old, new = shape(source), shape(r.node)
    found: list[Expr] = []
    for olds, news in _groups(old, new):
        at = r.index[news.start : news.stop]
        if len(olds) == len(news) == 1:
            found.append(at[0])
        else:
            found += _unfolded(r, _flat(r, at, new[news.start : news.stop]), old[olds.start : olds.stop])
    return r.at(source, tuple(found))


def _groups(old: tuple[Size, ...], new: tuple[Size, ...]) -> list[tuple[range, range]]:
    groups, a, b = [], 0, 0
    while a < len(old) or b < len(new):
        first, second = a, b
        left: Size = 1
        right: Size = 1
        while True:
            grow_old = a < len(old) and (a == first or b == len(new) or (b > second and _smaller(left, right)))
            if grow_old:
                left, a = left * old[a], a + 1
            elif b < len(new):
                right, b = right * new[b], b + 1
            else:
                break
            if a > first and b > second and equal(left, right):
                break
        groups.append((range(first, a), range(second, b)))
    return groups


def _smaller(left: Size, right: Size) -> bool:
    return not (isinstance(left, int) and isinstance(right, int)) or left < right


def _flat(r: Reading, at: Index, sizes: tuple[Size, ...]) -> Expr:
    total = const(0)
    for place, size in zip(at, sizes, strict=True):
        if not is_one(size):
            total = total * r.reader.number(size) + place
    return r.reader.simplified(total)


def _unfolded(r: Reading, flat: Expr, sizes: tuple[Size, ...]) -> list[Expr]:
    found: list[Expr] = []
    real_dims = [n for n, size in enumerate(sizes) if not is_one(size)]
    stride = const(1)
    for n in reversed(range(len(sizes))):
        if is_one(sizes[n]):
            found.append(const(0))
            continue
        size = r.reader.number(sizes[n])
        at = flat if stride == const(1) else flat // stride
        found.append(r.reader.simplified(at if n == real_dims[0] else at % size))
        stride = r.reader.simplified(stride * size)
    return found[::-1]


def _slice(r: Reading) -> Expr:
    source, dim = r.tensor("self"), r.dim("dim", r.rank)
    start = r.call.get("start")
    step = r.number("step") if r.call.get("step") is not None else const(1)
    begin = _from_start(r, const(0) if start is None else r.reader.number(start), shape(source)[dim])
    return r.at(source, r.moved(dim, r.index[dim] * step + begin))


def _from_start(r: Reading, place: Expr, size: Size) -> Expr:
    """A place as Python counts it, negative ones from the end, cut off at the borders."""
    if not place.is_const or not isinstance(size, int):
        if place.is_const and place.value == 0:
            return place
        length = r.reader.number(size)
        counted = where(place < 0, place + length, place)
        return r.reader.simplified(combine("max", combine("min", counted, length), 0))
    at = int(place.value)  # type: ignore[arg-type]
    return const(min(max(at + size if at < 0 else at, 0), size))


def _select(r: Reading) -> Expr:
    source = r.tensor("self")
    sizes = shape(source)
    dim = r.dim("dim", len(sizes))
    at = r.number("index")
    if at.is_const and int(at.value) < 0:  # type: ignore[arg-type]
        at = r.reader.simplified(at + r.reader.number(sizes[dim]))
    elif not at.is_const:
        at = where(at < 0, at + r.reader.number(sizes[dim]), at)
    return r.at(source, (*r.index[:dim], at, *r.index[dim:]))


def _repeat(r: Reading) -> Expr:
    source = r.tensor("self")
    sizes = shape(source)
    mine = r.index[r.rank - len(sizes) :]
    new = shape(r.node)[r.rank - len(sizes) :]
    at = [
        const(0) if is_one(s) else x if equal(s, n) else r.reader.simplified(x % r.reader.number(s))
        for s, n, x in zip(sizes, new, mine, strict=True)
    ]
    return r.at(source, tuple(at))


def _repeat_interleave(r: Reading) -> Expr:
    repeats = r.number("repeats")
    source = r.tensor("self")
    dim = r.call.get("dim")
    if dim is None and len(shape(source)) != 1:
        raise OpaqueError
    dim = 0 if dim is None else dim % r.rank
    return r.at(source, r.moved(dim, r.index[dim] // repeats))


def _flip(r: Reading) -> Expr:
    at = list(r.index)
    for dim in r.call["dims"]:
        at[dim] = r.reader.simplified(r.reader.number(shape(r.node)[dim]) - 1 - at[dim])
    return r.at(r.tensor("self"), tuple(at))


def _roll(r: Reading) -> Expr:
    if not r.call["dims"]:
        raise OpaqueError
    at = list(r.index)
    for dim, by in zip(r.call["dims"], r.call["shifts"], strict=True):
        at[dim] = r.reader.simplified((at[dim] - r.reader.number(by)) % r.reader.number(shape(r.node)[dim]))
    return r.at(r.tensor("self"), tuple(at))


def joined(r: Reading, parts: list[Argument], dim: int) -> Expr:
    """The parts one behind the other."""
    at, begin, pieces = r.index[dim], const(0), []
    for part in parts:
        pieces.append((begin, r.at(part, r.moved(dim, at - begin))))
        begin = r.reader.simplified(begin + r.reader.number(shape(part)[dim]))
    result = pieces[-1][1]
    for place in range(len(pieces) - 2, -1, -1):
        result = where(at < pieces[place + 1][0], cast(pieces[place][1], r.dtype), cast(result, r.dtype))
    return result


def _cat(r: Reading) -> Expr:
    tensors = [x for x in r.call["tensors"] if len(shape(x)) == r.rank]
    return joined(r, tensors, r.dim("dim", r.rank))


def _stack(r: Reading) -> Expr:
    dim = r.dim("dim", r.rank)
    rest = r.index[:dim] + r.index[dim + 1 :]
    *others, result = [r.at(x, rest) for x in r.call["tensors"]]
    for n in range(len(others) - 1, -1, -1):
        result = where(r.index[dim] <= n, others[n], result)
    return result


def _pad(r: Reading) -> Expr:
    if r.call.get("mode", "constant") != "constant":
        raise OpaqueError
    source, widths, value = r.tensor("self"), r.call["pad"], r.call.get("value")
    sizes, at, inside = shape(source), list(r.index), []
    for n in range(len(widths) // 2):
        dim = r.rank - 1 - n
        before, after = (r.reader.number(x) for x in widths[2 * n : 2 * n + 2])
        at[dim] = r.reader.simplified(at[dim] - before)
        inside += [] if before == const(0) else [at[dim] >= 0]
        inside += [] if after == const(0) else [at[dim] < r.reader.number(sizes[dim])]
    kept = r.at(source, tuple(at))
    return where(every(*inside), cast(kept, r.dtype), cast(r.reader.number(value or 0), r.dtype)) if inside else kept


def _diagonal_part(lower: bool) -> Rule:
    def rule(r: Reading) -> Expr:
        above = r.index[-1] - r.index[-2]
        diagonal = r.number("diagonal")
        shown = above <= diagonal if lower else above >= diagonal
        return where(shown, r.at(r.tensor("self"), r.index), cast(const(0), r.dtype))

    return rule


def _squeeze(r: Reading) -> Expr:
    source, rest = r.tensor("self"), list(r.index)
    sizes, dims = shape(source), r.call.get("dim")
    gone = range(len(sizes)) if dims is None else [d % len(sizes) for d in ([dims] if isinstance(dims, int) else dims)]
    at = [const(0) if n in gone and is_one(size) else rest.pop(0) for n, size in enumerate(sizes)]
    return r.at(source, tuple(at))


LAYOUT: Rules = {
    "same": _same,
    "expand": _expand,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "transpose": lambda r: _swapped(r.dim("dim0", r.rank), r.dim("dim1", r.rank), r),
    "transpose_last": lambda r: _swapped(-1, -2, r),
    "transpose_all": lambda r: _permuted(tuple(reversed(range(r.rank))), r),
    "permute": lambda r: _permuted(tuple(r.call["dims"]), r),
    "movedim": _movedim,
    "view": _view,
    "slice": _slice,
    "select": _select,
    "repeat": _repeat,
    "tile": _repeat,
    "repeat_interleave": _repeat_interleave,
    "flip": _flip,
    "roll": _roll,
    "cat": _cat,
    "stack": _stack,
    "pad": _pad,
    "tril": _diagonal_part(lower=True),
    "triu": _diagonal_part(lower=False),
}
