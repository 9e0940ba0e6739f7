"""Atoms: the indivisible axes that the dimensions of a graph's tensors are made of, whatever a model does with views."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import SymInt

from attn_compiler.algebra.expr import Expr, Operand, const, lift


@dataclass(frozen=True, eq=False)
class Atom:
    """One axis that nothing splits. Two atoms of the same size are still two axes: identity is what counts."""

    size: int | SymInt

    @property
    def is_unit(self) -> bool:
        return isinstance(self.size, int) and self.size == 1

    def __repr__(self) -> str:
        return f"<{self.size}>"


Axis = tuple[Atom, ...]  # one dimension of a tensor, its atoms outermost first, as in a row-major reshape
Axes = tuple[Axis, ...]


def product(axis: Iterable[Atom]) -> int | SymInt:
    """How many places an axis made of these atoms has."""
    result: int | SymInt = 1
    for atom in axis:
        result = result * atom.size
    return result


def coordinates(group: Axis, index: Operand) -> dict[Atom, Expr]:
    """Where each atom stands when the axis made of `group` stands at `index`; without those that a symbolic size hides."""
    found: dict[Atom, Expr] = {}
    stride: int | SymInt = 1
    for place, atom in reversed(list(enumerate(group))):
        if atom.is_unit:
            found[atom] = const(0)
            continue
        if not isinstance(stride, int):
            break
        at = lift(index) // stride if stride != 1 else lift(index)
        outermost = all(outer.is_unit for outer in group[:place])
        if outermost:
            found[atom] = at
        elif isinstance(atom.size, int):
            found[atom] = at % atom.size
        stride = stride * atom.size
    return found
