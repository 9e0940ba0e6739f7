"""Reads what `torch.vmap` made: functions of single places, whose nodes carry no values of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import fx

from attn_compiler import torch_private as private
from attn_compiler.algebra.expr import Expr, const, same
from attn_compiler.graph.calls import Argument, call, is_tensor, shape
from attn_compiler.graph.symbolic_reading import Index, OpaqueError, as_bool, as_number, combine, is_exact

_METHODS: Mapping[str, str] = {
    "__and__": "and", "__or__": "or", "__rand__": "and", "__ror__": "or", "__eq__": "eq", "__le__": "le", "__lt__": "lt",
    "__ge__": "ge", "__gt__": "gt", "__ne__": "ne", "__invert__": "not", "logical_and": "and", "logical_or": "or",
    "bitwise_and": "and", "bitwise_or": "or", "__add__": "add", "__sub__": "sub", "__mul__": "mul", "and_": "and", "or_": "or",
    "invert": "not", "logical_not": "not", "bitwise_not": "not",
}  # fmt: skip


class _View(Protocol):
    def read(self, node: fx.Node, index: Index, by: fx.Node) -> Expr: ...

    def number(self, x: Argument) -> Expr: ...


def read_vmapped(view: _View, node: fx.Node, index: Index) -> Expr:
    """The result of a nest of vmaps, of a function that returns one number, at `index`."""
    lanes: dict[Argument, Expr] = {}
    rest, inner = list(index), node
    while isinstance(inner, fx.Node) and private.leaves_region(inner):
        source, level, _, dim = inner.args
        lanes[level] = rest.pop(dim)  # type: ignore[arg-type]
        inner = source  # type: ignore[assignment]
    if rest:
        raise OpaqueError
    return _Region(view, node, lanes).value(inner)


class _Region:
    def __init__(self, view: _View, end: fx.Node, lanes: Mapping[Argument, Expr]) -> None:
        self._view, self._end, self._lanes = view, end, lanes

    def value(self, x: Argument) -> Expr:
        """A batched value on its lane, or a number."""
        if not isinstance(x, fx.Node) or x.meta.get("val") is not None:
            return self._outside(x)
        if x.op not in ("call_function", "call_method"):
            raise OpaqueError
        name = str(x.target) if x.op == "call_method" else call(x).op
        return self._applied(_METHODS.get(name, name), x)

    def _outside(self, x: Argument) -> Expr:
        if is_tensor(x):
            if shape(x):
                raise OpaqueError
            return self._view.read(x, (), self._end)
        return self._view.number(x)

    def _applied(self, op: str, x: fx.Node) -> Expr:
        if private.enters_region(x):
            source, _, level = x.args
            if not is_tensor(source) or len(shape(source)) != 1:
                raise OpaqueError
            return self._view.read(source, (self._lanes[level],), self._end)  # type: ignore[arg-type]
        if op in ("new_ones", "new_zeros"):
            if tuple(x.args[1]) or x.kwargs.get("dtype") is not torch.bool:  # type: ignore[arg-type]
                raise OpaqueError
            return const(op == "new_ones")
        if op in ("to", "clone", "contiguous", "cast"):
            if any(isinstance(a, torch.dtype) for a in (*x.args, *x.kwargs.values())):
                raise OpaqueError
            return self.value(x.args[0])
        if op == "index":
            return self._indexed(x)
        return _combined(op, tuple(self.value(a) for a in x.args))

    def _indexed(self, x: fx.Node) -> Expr:
        source, places = x.args[0], x.args[1]
        if not is_tensor(source) or not isinstance(places, list | tuple) or len(places) != len(shape(source)):
            raise OpaqueError
        at = tuple(self.value(place) for place in places)
        if any(place.tables() for place in at):
            raise OpaqueError  # it may be negative
        return self._view.read(source, at, self._end)  # type: ignore[arg-type]


def _combined(op: str, args: Index) -> Expr:
    if op in ("and", "or", "not"):
        return combine(op, *map(as_bool, args))
    if op in ("eq", "ne") and all(a.sort.value == "bool" for a in args):
        result = same(*args)
        return ~result if op == "ne" else result
    numbers = tuple(map(as_number, args))
    if not all(is_exact(a) for a in numbers):
        raise OpaqueError
    match op:
        case "add" | "sub" | "mul" | "lt" | "le" | "eq" | "abs" | "neg":
            return combine(op, *numbers)
        case "gt" | "ge":
            return combine("lt" if op == "gt" else "le", *numbers[::-1])
        case "ne":
            return ~combine("eq", *numbers)
        case "floordiv" | "mod" if numbers[1].is_const:
            return combine(op, *numbers)
    raise OpaqueError
