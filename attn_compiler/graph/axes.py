"""Follows atoms through views: what each dimension is made of, however a model reshapes, permutes and repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import SymInt, fx

from attn_compiler import torch_private as private
from attn_compiler.graph.atom import Atom, Axes, Axis, product
from attn_compiler.graph.calls import Call, Size, call, dtype, equal, is_one, is_tensor, shape


class Atoms:
    """The atoms of one site. Splitting one, or finding two to be the same axis, holds everywhere at once."""

    def __init__(self) -> None:
        self._parts: dict[Atom, Axis] = {}
        self._repeats: set[Atom] = set()  # atoms along which nothing changes: expand, repeat

    def fresh(self, sizes: Iterable[Size]) -> Axes:
        """One new atom per dimension."""
        return tuple((Atom(size),) for size in sizes)

    def resolve(self, axis: Axis) -> Axis:
        """What `axis` is made of by all that is known now."""
        return tuple(leaf for atom in axis for leaf in (self.resolve(self._parts[atom]) if atom in self._parts else (atom,)))

    def repeat(self, size: Size) -> Atom:
        atom = Atom(size)
        self._repeats.add(atom)
        return atom

    def unify(self, a: Axis, b: Axis) -> bool:
        """Make two axes one, splitting atoms where needed; false if they cannot be."""
        left, right = list(self.resolve(a)), list(self.resolve(b))
        if any(not x.is_unit for x in left + right):
            left, right = [x for x in left if not x.is_unit], [x for x in right if not x.is_unit]
        while left and right:
            x, y = left.pop(0), right.pop(0)
            if x is y:
                continue
            last = not left and not right and not isinstance(x.size + y.size, int)
            if equal(x.size, y.size) or last:  # the operator needs both to be equal, also where nobody can prove it
                self._link(x, y)
            elif _divides(y.size, x.size):
                left[:0] = self._split(x, y.size)
                right.insert(0, y)
            elif _divides(x.size, y.size):
                left.insert(0, x)
                right[:0] = self._split(y, x.size)
            else:
                return False
        return all(atom.is_unit for atom in left + right)

    def _link(self, x: Atom, y: Atom) -> None:
        replaced, kept = (x, y) if x in self._repeats and y not in self._repeats else (y, x)
        self._parts[replaced] = (kept,)

    def _split(self, atom: Atom, outer: Size) -> Axis:
        parts = (Atom(outer), Atom(quotient(atom.size, outer)))
        self._parts[atom] = parts
        if atom in self._repeats:
            self._repeats.update(parts)
        return parts

    def reshape(self, axes: Axes, sizes: Sequence[Size]) -> Axes | None:
        """The axes after a row-major reshape; None where a new dimension cuts through an atom."""
        waiting = [atom for axis in axes for atom in self.resolve(axis)]
        result: list[Axis] = []
        for size in sizes:
            taken = self._take(waiting, size)
            if taken is None:
                return None
            result.append(taken)
        if any(not atom.is_unit for atom in waiting):
            return None
        if result:
            result[-1] += tuple(waiting)
        return tuple(result)

    def _take(self, waiting: list[Atom], size: Size) -> Axis | None:
        """Take a dimension of `size` from the front of `waiting`."""
        taken: list[Atom] = []
        filled: Size = 1
        if is_one(size):
            return (waiting.pop(0),) if waiting and waiting[0].is_unit else ()
        while not equal(filled, size):
            if not waiting:
                return None
            atom = waiting.pop(0)
            if not _divides(filled * atom.size, size):
                missing = quotient(size, filled)
                if not _divides(missing, atom.size):
                    return None
                atom, rest = self._split(atom, missing)
                waiting.insert(0, rest)
            taken.append(atom)
            filled = filled * atom.size
        return tuple(taken)

    def follow(self, node: fx.Node, axes: Axes) -> Axes | None:
        """The axes of a view, given those of its input; None if `node` does more than rearrange or repeat."""
        read, axes = call(node), tuple(self.resolve(axis) for axis in axes)
        if read.op in _RESHAPES:
            return self.reshape(axes, shape(node))
        if read.op in ("expand", "repeat", "tile", "repeat_interleave"):
            return self._repeated(read, node, axes)
        return _MOVES[read.op](read, axes) if read.op in _MOVES else axes

    def _repeated(self, read: Call, node: fx.Node, axes: Axes) -> Axes | None:
        sizes = shape(node)
        axes = ((),) * (len(sizes) - len(axes)) + axes
        inside = read.op == "repeat_interleave"
        result: list[Axis] = []
        for axis, size in zip(axes, sizes, strict=True):
            old = product(axis)
            if equal(old, size):
                result.append(axis)
            elif _divides(old, size):
                times = (self.repeat(quotient(size, old)),)
                result.append(axis + times if inside else times + axis)
            else:
                return None
        return tuple(result)


_RESHAPES = frozenset(("view", "squeeze", "unsqueeze"))
_REPEATS = frozenset(("expand", "repeat", "tile", "repeat_interleave"))


def _transpose(read: Call, axes: Axes) -> Axes:
    a, b = read["dim0"], read["dim1"]
    order = list(range(len(axes)))
    order[a], order[b] = order[b], order[a]
    return tuple(axes[place] for place in order)


def _permute(read: Call, axes: Axes) -> Axes:
    return tuple(axes[dim] for dim in read["dims"])


def _movedim(read: Call, axes: Axes) -> Axes:
    def places(key: str) -> list[int]:
        given = read[key]
        return [dim % len(axes) for dim in ([given] if isinstance(given, int) else given)]

    moved = dict(zip(places("destination"), places("source"), strict=True))
    rest = iter(dim for dim in range(len(axes)) if dim not in moved.values())
    return tuple(axes[moved[place] if place in moved else next(rest)] for place in range(len(axes)))


_MOVES: Mapping[str, Callable[[Call, Axes], Axes]] = {
    "transpose": _transpose,
    "transpose_last": lambda _, axes: (*axes[:-2], axes[-1], axes[-2]),
    "transpose_all": lambda _, axes: axes[::-1],
    "permute": _permute,
    "movedim": _movedim,
}


def rearranges(node: fx.Node) -> bool:
    """Whether `node` only changes how its input is laid out."""
    read = call(node)
    if read.op == "copy":
        return _overwrites(read["self"], read["src"])
    if read.writes or not is_tensor(node):
        return False
    if read.op in _RESHAPES:
        return "dtype" not in read.arguments
    if read.op == "same":
        return "detach" not in str(node.target)
    if read.op == "slice":
        return is_tensor(read["self"]) and all(map(equal, shape(node), shape(read["self"])))
    return read.op in _MOVES or (read.op == "cast" and dtype(node) == dtype(source(node)))


def _overwrites(into: fx.Node, written: fx.Node) -> bool:
    """Whether a copy leaves nothing of what was there, and changes nothing of what it writes."""
    if not is_tensor(written) or dtype(into) != dtype(written):
        return False
    return len(shape(into)) == len(shape(written)) and all(map(equal, shape(into), shape(written)))


def repeats(node: fx.Node) -> bool:
    """Whether `node` only repeats its input along some axes."""
    read = call(node)
    return read.op in _REPEATS and isinstance(read.get("repeats", 1), int | list | tuple) and not read.writes


def source(node: fx.Node) -> fx.Node:
    """The tensor that a view is taken of, or a copy made."""
    read = node.args[1 if call(node).op == "copy" else 0]
    assert isinstance(read, fx.Node)
    return read


def quotient(a: Size, b: Size) -> Size:
    """`a / b`, known to be whole; a number where the symbols cancel."""
    result = a // b
    if isinstance(result, SymInt) and private.formula(result).is_number:
        return int(private.formula(result))
    return result


def _divides(a: Size, b: Size) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a != 0 and b % a == 0
    rest: Size = b % a  # type: ignore[operator]  # a number modulo a symbol is fine
    return bool(private.statically_known_true(rest == 0))
