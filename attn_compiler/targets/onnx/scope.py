"""What the leaves of expressions stand for where some queries meet some keys: axes [batch, heads, queries, keys]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import onnx_ir as ir

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.linear import linear as sum_of
from attn_compiler.planning.site import Length
from attn_compiler.targets.exported import Spec, Stored, sort_of
from attn_compiler.targets.onnx.nodes import DTYPES, Nodes, Value, type_of
from attn_compiler.targets.onnx.printer import Printer
from attn_compiler.targets.operands import PLACE

_AXES: Mapping[Expr, int] = {e.b: 4, e.h: 3, e.i: 2, PLACE: 1}  # where a coordinate stands, from the right
_AXES_OF_BLOCKS: Mapping[Expr, int] = {e.b: 5, e.h: 4}  # and where blocks have an axis of their own before that of queries


class Tokens(Protocol):
    """Some of the tokens of one axis."""

    def pick(self, nodes: Nodes, x: ir.Value, axis: int) -> ir.Value:
        """What `x` holds of these tokens along an axis."""

    def places(self, nodes: Nodes) -> ir.Value:
        """Their places among all tokens, as a tensor of one axis."""

    @property
    def count(self) -> Value:
        """How many they are."""


@dataclass(frozen=True)
class All:
    """All tokens of an axis."""

    count: Value

    def pick(self, nodes: Nodes, x: ir.Value, axis: int) -> ir.Value:
        return x

    def places(self, nodes: Nodes) -> ir.Value:
        return nodes.range(0, self.count)


@dataclass(frozen=True)
class Neighbors:
    """The tokens from `start` to before `stop`, or every so many of them."""

    start: Value
    stop: Value
    count: Value
    step: Value = 1

    def pick(self, nodes: Nodes, x: ir.Value, axis: int) -> ir.Value:
        return nodes.slice(x, axis, self.start, self.stop, self.step)

    def places(self, nodes: Nodes) -> ir.Value:
        return nodes.range(self.start, self.stop, self.step)


@dataclass(frozen=True)
class Listed:
    """Tokens by their places."""

    listed: ir.Value
    count: Value

    def pick(self, nodes: Nodes, x: ir.Value, axis: int) -> ir.Value:
        return nodes.op("Gather", x, self.listed, axis=axis)

    def places(self, nodes: Nodes) -> ir.Value:
        return self.listed


@dataclass(frozen=True)
class Blocks:
    """Tokens of a block, or of blocks side by side: [blocks, tokens]. `inside` are those that exist, in place of what fills."""

    listed: ir.Value
    inside: ir.Value
    count: Value

    def pick(self, nodes: Nodes, x: ir.Value, axis: int) -> ir.Value:
        return nodes.op("Gather", x, self.inside, axis=axis)

    def places(self, nodes: Nodes) -> ir.Value:
        return self.listed


@dataclass(frozen=True)
class Joined:
    """Several runs of tokens, one after the other."""

    parts: tuple[Tokens, ...]
    count: Value

    def pick(self, nodes: Nodes, x: ir.Value, axis: int) -> ir.Value:
        return nodes.op("Concat", *(part.pick(nodes, x, axis) for part in self.parts), axis=axis)

    def places(self, nodes: Nodes) -> ir.Value:
        return nodes.op("Concat", *(part.places(nodes) for part in self.parts), axis=0)


@dataclass(frozen=True)
class Inputs:
    """What a function takes. Tables have names of the model's choice, which may be those of operands."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    tables: Mapping[str, ir.Value]


@dataclass
class Scope:
    """Where expressions are printed: some query heads, queries and keys of a call. `outer` is the scope around a loop.

    Where queries stand in so many `blocks` side by side, these have an axis of their own: [batch, heads, blocks, queries, keys].
    """

    spec: Spec
    nodes: Nodes
    inputs: Inputs
    heads: tuple[int, ...]
    queries: Tokens
    keys: Tokens
    outer: Scope | None = None
    blocks: Value | None = None
    _printers: dict[str, Printer] = field(default_factory=dict)

    @property
    def axes(self) -> Mapping[Expr, int]:
        """The coordinates that have an axis to themselves, and where that stands, from the right."""
        return _AXES if self.blocks is None else _AXES_OF_BLOCKS

    @property
    def real(self) -> str:
        """How real numbers are held while computing: half precision only stores."""
        return real_of(self.spec)

    @property
    def scores(self) -> Printer:
        return self.printer(self.real)

    @property
    def masks(self) -> Printer:
        """Real numbers in a mask decide, so they are in double precision."""
        return self.printer("float64")

    def printer(self, real: str) -> Printer:
        """Prints with real numbers that are held as `real`."""
        if real not in self._printers:
            outer = self.outer.printer(real) if self.outer else None
            varies = frozenset((e.i, PLACE)) if outer else frozenset[Expr]()
            self._printers[real] = Printer(self.nodes, lambda node, at: self._leaf(node, at, real), real, outer, varies)
        return self._printers[real]

    def _leaf(self, node: Expr, at: Sequence[Value], real: str) -> Value:
        if node.op == "table":
            return self._table(node, at, real)
        if node in (e.h, e.kv):
            ratio = self.spec.heads // self.spec.kv_heads if node == e.kv else 1
            return self.nodes.constant(np.asarray(self.heads).reshape(-1, *[1] * (self.axes[e.h] - 1)) // ratio, "int64")
        if node in (e.q_len, e.k_len):
            return self._lengths[node]
        places = {e.b: self._batch, e.i: self.queries.places, PLACE: self.keys.places}[node](self.nodes)
        if node == PLACE:
            return places if self.blocks is None else self.nodes.op("Unsqueeze", places, self.nodes.vector(1))
        if node == e.i and self.blocks is not None:
            return self.nodes.op("Unsqueeze", places, self.nodes.vector(-1))
        return self.nodes.reshape(places, -1, *[1] * (self.axes[node] - 1))

    def _batch(self, nodes: Nodes) -> ir.Value:
        return nodes.range(0, nodes.size(self.inputs.q, 0))

    @cached_property
    def _lengths(self) -> Mapping[Expr, Value]:
        return {e.q_len: self.nodes.size(self.inputs.q, 2), e.k_len: self.nodes.size(self.inputs.k, 2)}

    def _table(self, node: Expr, at: Sequence[Value], real: str) -> ir.Value:
        stored, table = self.spec.table(str(node.value)), self.inputs.tables[str(node.value)]
        axes = len(stored.shape)
        coordinates = node.args[len(node.args) - axes :]
        if self._counts(coordinates, stored):
            read = self._view(table, coordinates, stored)
        else:
            read = self._gathered(table, at[len(at) - axes :], stored)
        wanted = type_of(node.sort, real)
        return read if stored.dtype == wanted else self.nodes.op("Cast", read, to=int(DTYPES[wanted]))

    def _counts(self, coordinates: Sequence[Expr], stored: Stored) -> bool:
        """Whether a table's axes are those of the call, or begin some tokens before these, so that it is a view."""
        spec, apart = self.spec, [_from(coordinate) for coordinate in coordinates]
        places = [self.axes.get(axis, 0) for axis, _ in apart]
        sizes = {e.b: spec.batch, e.h: spec.heads, e.i: spec.q_len, PLACE: spec.k_len}
        fits = all(
            (size == 1 and not first) or (axis in sizes and size == _longer(sizes[axis], first))
            for (axis, first), size in zip(apart, stored.shape, strict=True)
        )
        return fits and 0 not in places and sorted(set(places), reverse=True) == places

    def _view(self, table: ir.Value, coordinates: Sequence[Expr], stored: Stored) -> ir.Value:
        places = set()
        for axis, (coordinate, size) in enumerate(zip(coordinates, stored.shape, strict=True)):
            counted, first = _from(coordinate)
            places.add(self.axes[counted])
            if size == 1 or counted == e.b:
                continue
            if counted == e.h:
                table = picked(self.nodes, table, self.heads, self.spec.heads, axis)
                continue
            if first:
                table = self.nodes.slice(table, axis, first, np.iinfo(np.int64).max)
            tokens = self.queries if counted == e.i else self.keys
            table = tokens.pick(self.nodes, table, axis)
        rank = max(places, default=0)
        new = [rank - place for place in range(rank, 0, -1) if place not in places]
        return self.nodes.op("Unsqueeze", table, self.nodes.vector(*new)) if new else table

    def _gathered(self, table: ir.Value, at: Sequence[Value], stored: Stored) -> ir.Value:
        """The table read anywhere; an index outside is moved to the border."""
        if not at:
            return table
        nodes, flat = self.nodes, ir.Value()
        for axis, (index, size) in enumerate(zip(at, stored.shape, strict=True)):
            extent = nodes.index(size if isinstance(size, int) else nodes.size(table, axis))
            last = nodes.op("Sub", extent, nodes.index(1))
            inside = nodes.op("Max", nodes.op("Min", nodes.index(index), last), nodes.index(0))
            flat = nodes.op("Add", nodes.op("Mul", flat, extent), inside) if axis else inside
        return nodes.op("Gather", nodes.reshape(table, -1), flat, axis=0)


def _from(coordinate: Expr) -> tuple[Expr, int]:
    """The coordinate that counts tokens, and at which of them the count begins."""
    if coordinate.op not in ("add", "sub"):
        return coordinate, 0
    found = sum_of(coordinate)
    counted = next(iter(found.factors), coordinate)
    return (counted, found.constant) if found.factors == {counted: 1} and found.constant > 0 else (coordinate, 0)


def _longer(length: Length, tokens: int) -> Length:
    """So many tokens more than a length, as a trace calls that."""
    return length + tokens if isinstance(length, int) else f"{length} + {tokens}" if tokens else length


def real_of(spec: Spec) -> str:
    """How real numbers of a call are held while computing."""
    return "float64" if spec.dtype == "float64" else "float32"


def picked(nodes: Nodes, x: ir.Value, chosen: Sequence[int], of: int, axis: int) -> ir.Value:
    """Some numbers along an axis of length `of`."""
    if tuple(chosen) == tuple(range(of)):
        return x
    if list(chosen) == list(range(chosen[0], chosen[0] + len(chosen))):
        return nodes.slice(x, axis, chosen[0], chosen[0] + len(chosen))
    return nodes.op("Gather", x, nodes.constant(list(chosen), "int64"), axis=axis)


def sorts_fit(stored: Stored, sort: Sort) -> bool:
    """Whether a table can be read as a sort."""
    return (sort is Sort.BOOL) == (sort_of(stored.dtype) is Sort.BOOL)
