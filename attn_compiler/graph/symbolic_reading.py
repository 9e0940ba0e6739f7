"""What an operation's rule sees while a graph is read symbolically: the node, the place it is read at, and its operands there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx

from attn_compiler.algebra.evaluate import PYTHON
from attn_compiler.algebra.expr import Expr, Sort, apply, ceil, const, floor, lift, real, where
from attn_compiler.algebra.expr import Operand as Number
from attn_compiler.graph.calls import Argument, Call, Size, is_one, shape

Index = tuple[Expr, ...]


class OpaqueError(Exception):
    """A node whose value has no formula here; it becomes a table. Never leaves the reader."""


class Reader(Protocol):
    """Reads nodes of one graph at places."""

    def read(self, node: fx.Node, index: Index, by: fx.Node) -> Expr: ...

    def number(self, x: Argument) -> Expr: ...

    def simplified(self, e: Expr) -> Expr: ...

    def fresh(self, size: Size) -> Expr: ...


@dataclass(frozen=True)
class Reading:
    """One node, read at `index`."""

    reader: Reader
    node: fx.Node
    call: Call
    index: Index

    @property
    def rank(self) -> int:
        return len(self.index)

    @property
    def dtype(self) -> torch.dtype:
        tensor: torch.Tensor = self.node.meta["val"]
        return tensor.dtype

    def tensor(self, name: str) -> fx.Node:
        """The operand `name`, which must be a tensor."""
        found = self.call.get(name)
        if not isinstance(found, fx.Node):
            raise OpaqueError
        return found

    def at(self, node: Argument, index: Index) -> Expr:
        if not isinstance(node, fx.Node):
            raise OpaqueError
        return self.reader.read(node, index, self.node)

    def number(self, name: str) -> Expr:
        """The argument `name`: a Python number or a symbolic size."""
        return self.reader.number(self.call.get(name))

    def dim(self, name: str, rank: int) -> int:
        found = self.call.get(name)
        if not isinstance(found, int):
            raise OpaqueError
        return found % max(rank, 1)

    def operand(self, argument: Argument) -> Expr:
        """An argument of a pointwise operation: a number, or a tensor that is broadcast against the result."""
        tensor = argument.meta.get("val") if isinstance(argument, fx.Node) else None
        if not isinstance(tensor, torch.Tensor):
            return self.reader.number(argument)
        return self.at(argument, self.broadcast(argument))

    def broadcast(self, node: fx.Node) -> Index:
        """Where an operand of fewer or shorter dimensions is read."""
        sizes = shape(node)
        mine = self.index[self.rank - len(sizes) :]
        return tuple(const(0) if is_one(size) else at for size, at in zip(sizes, mine, strict=True))

    def moved(self, dim: int, at: Expr) -> Index:
        return (*self.index[:dim], self.reader.simplified(at), *self.index[dim + 1 :])


Rule = Callable[[Reading], Expr]
Rules = Mapping[str, Rule]


def sort_of(dtype: torch.dtype) -> Sort:
    if dtype is torch.bool:
        return Sort.BOOL
    if dtype.is_complex or dtype.is_floating_point:
        return Sort.REAL
    return Sort.INDEX


def as_bool(e: Expr) -> Expr:
    return e if e.sort is Sort.BOOL else ~apply("eq", e, const(0) if e.sort is Sort.INDEX else const(0.0))


def as_number(e: Expr) -> Expr:
    return where(e, 1, 0) if e.sort is Sort.BOOL else e


def cast(e: Expr, dtype: torch.dtype) -> Expr:
    """`e` as a value of `dtype`. What rounds in a way that a formula cannot follow is refused."""
    if dtype.is_complex:
        raise OpaqueError
    wanted = sort_of(dtype)
    if e.op == "where" and e.sort is not Sort.BOOL and all(x.is_const for x in e.args[1:]):
        return where(e.args[0], *(cast(x, dtype) for x in e.args[1:])) if wanted is not Sort.BOOL else as_bool(e)
    if wanted is Sort.BOOL:
        return as_bool(e)
    if wanted is Sort.INDEX:
        return _whole(e, dtype)
    if e.sort is Sort.BOOL:
        return where(e, 1.0, 0.0)
    if e.is_const:
        return const(float(torch.tensor(e.value, dtype=torch.float64).to(dtype).item()))
    if e.sort is Sort.INDEX and dtype not in (torch.float32, torch.float64):
        raise OpaqueError  # large positions are rounded there
    return e if e.sort is Sort.REAL else real(e)


def _whole(e: Expr, dtype: torch.dtype) -> Expr:
    e = as_number(e)
    if e.sort is Sort.INDEX:
        if dtype not in (torch.int64, torch.int32) and not _small(e):
            raise OpaqueError  # it may wrap around
        return e
    if not is_exact(e):
        raise OpaqueError
    return where(e < 0.0, ceil(e), floor(e))


def _small(e: Expr) -> bool:
    if e.op == "where":
        return all(_small(x) for x in e.args[1:])
    return e.is_const and 0 <= float(e.value) < 128  # type: ignore[arg-type]


_EXACT = frozenset(("add", "sub", "neg", "abs", "min", "max", "where", "real", "mul"))


def is_exact(e: Expr) -> bool:
    """Whether `e` is computed without rounding: a comparison or a truncation of it cannot fall on the other side."""
    if e.sort is not Sort.REAL or e.op == "table":
        return True
    if e.is_const:
        value = float(e.value)  # type: ignore[arg-type]
        return value in (float("inf"), float("-inf")) or (value * 256).is_integer()
    return e.op in _EXACT and all(is_exact(a) for a in e.args if a.sort is not Sort.BOOL)


def combine(op: str, *operands: Number) -> Expr:
    """Apply an operation; a choice between constants stays one, so that masks made of 0 and 1 remain truth values."""
    args = tuple(as_number(lift(x)) if op not in ("and", "or", "not") else lift(x) for x in operands)
    chosen = {a.args[0] for a in args if _is_choice(a)}
    if len(chosen) == 1 and all(a.is_const or _is_choice(a) for a in args):
        (condition,) = chosen
        yes, no = (combine(op, *(a.args[side] if _is_choice(a) else a for a in args)) for side in (1, 2))
        return where(condition, yes, no)
    if op == "mul" and all(_is_choice(a) and a.args[2].value == 0 for a in args):
        a, b = args
        return where(a.args[0] & b.args[0], combine(op, a.args[1], b.args[1]), a.args[2])
    if op == "mul" and any(a.is_const and a.value == 1 for a in args):
        return next((a for a in args if not (a.is_const and a.value == 1)), args[0])
    if op in ("add", "sub") and args[1].is_const and args[1].value == 0:
        return args[0]
    if op == "add" and args[0].is_const and args[0].value == 0:
        return args[1]
    return _folded(op, args)


def _is_choice(e: Expr) -> bool:
    return e.op == "where" and all(x.is_const for x in e.args[1:])


def _folded(op: str, args: Index) -> Expr:
    made = apply(op, *args)
    if not all(a.is_const for a in args):
        return made
    try:
        value = PYTHON[op](*(a.value for a in args))
        return const(float(value) if made.sort is Sort.REAL else value)
    except (ArithmeticError, ValueError, TypeError) as failure:
        raise OpaqueError from failure
