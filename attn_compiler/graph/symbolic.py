"""Reads tensors of a graph symbolically: what stands at a place, as an expression; what has no formula becomes a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from attn_compiler import torch_private as private
from attn_compiler.algebra.bounds import Box, Interval
from attn_compiler.algebra.expr import Expr, Sort, const, symbol, table
from attn_compiler.algebra.simplify import simplify
from attn_compiler.errors import AlgebraError
from attn_compiler.graph.calls import Argument, Size, call, is_tensor, shape, value
from attn_compiler.graph.mutation import Versions
from attn_compiler.graph.symbolic_creation import CREATION
from attn_compiler.graph.symbolic_indexing import INDEXING
from attn_compiler.graph.symbolic_layout import LAYOUT
from attn_compiler.graph.symbolic_pointwise import POINTWISE
from attn_compiler.graph.symbolic_reading import Index, OpaqueError, Reading, Rules, sort_of
from attn_compiler.graph.symbolic_vmap import read_vmapped

RULES: Rules = {**LAYOUT, **CREATION, **POINTWISE, **INDEXING}
_MOST_STEPS = 20_000
_NO_FACTS: Box = {}


@dataclass(frozen=True)
class Table:
    """What a table of a recovered expression is: a node of the graph until somebody writes to it, or the size of a dimension."""

    node: fx.Node
    sort: Sort
    dim: int | None = None
    until: fx.Node | None = None


Lifted = tuple["SymbolicReader", fx.Node]


class SymbolicReader:
    """Reads one graph. `placeholders` says what stands for some of its inputs: an expression, or a node of an outer graph."""

    def __init__(
        self,
        gm: fx.GraphModule,
        versions: Versions | None = None,
        placeholders: Mapping[fx.Node, Expr | Lifted] | None = None,
    ) -> None:
        self.versions = versions or Versions(gm.graph)
        self.tables: dict[str, Table] = {}
        self._gm = gm
        self._placeholders = placeholders or {}
        self._sizes: dict[str, Table] | None = None
        self._views: dict[frozenset[tuple[Expr, Interval]], _View] = {}

    @cached_property
    def recorded(self) -> frozenset[fx.Node]:
        """The nodes of this graph that autograd follows."""
        return private.recorded(self._gm.graph)

    def at(self, node: fx.Node, index: Index, facts: Box = _NO_FACTS) -> Expr:
        """The value of `node` at `index`, where `facts` bound the coordinates."""
        return self.view(facts).value(node, index)

    def number(self, x: Argument) -> Expr:
        """A Python number, a symbolic size or a node of one."""
        return self.view(_NO_FACTS).number(x)

    def table(self, node: fx.Node, index: Index, by: fx.Node | None = None) -> Expr:
        """`node` as a run-time tensor: what it was made as, or what `by` sees of it."""
        seen = value(node)
        sort = sort_of(seen.dtype) if isinstance(seen, torch.Tensor) else Sort.REAL
        name = node.name if by is None else f"{node.name}_in_{by.name}"
        self.tables[name] = Table(node, sort, until=self.versions.written(node, by or node))
        return table(name, *index, sort=sort)

    def size(self, name: str) -> Expr:
        """A symbol of the shapes of this graph."""
        if self._sizes is None:
            self._sizes = sizes(self._gm.graph)
        if name not in self._sizes:
            raise OpaqueError
        self.tables[name] = self._sizes[name]
        return table(name)

    def placeholder(self, node: fx.Node, index: Index, facts: Box) -> Expr:
        """What an input stands for; a node of an outer graph only as far as this graph can read the same tables."""
        lifted = self._placeholders.get(node)
        if isinstance(lifted, Expr):
            return lifted
        if lifted is not None:
            outer, at = lifted
            found = outer.at(at, index, facts)
            inner = {x[1].name: mine for mine, x in self._placeholders.items() if isinstance(x, tuple)}
            if found.tables() <= inner.keys() and all(outer.tables[name].until is None for name in found.tables()):
                for name in found.tables():
                    mine = inner[name]
                    self.tables[mine.name] = Table(mine, outer.tables[name].sort, until=self.versions.written(mine, mine))
                return found.transform(lambda e: table(inner[str(e.value)].name, *e.args, sort=e.sort) if e.op == "table" else e)
        return self.table(node, index)

    def view(self, facts: Box) -> _View:
        key = frozenset(facts.items())
        if key not in self._views:
            self._views[key] = _View(self, dict(facts))
        return self._views[key]


class _View:
    """Reads under one set of facts, each node at each place once."""

    def __init__(self, reader: SymbolicReader, facts: dict[Expr, Interval]) -> None:
        self._reader, self._facts = reader, facts
        self._known: dict[tuple[fx.Node, Index], Expr] = {}
        self._simple: dict[Expr, Expr] = {}
        self._steps = 0

    def value(self, node: fx.Node, index: Index) -> Expr:
        key = (node, index)
        if key not in self._known:
            self._known[key] = self._value(node, index)
        return self._known[key]

    def _value(self, node: fx.Node, index: Index) -> Expr:
        self._steps += 1
        if node.op == "placeholder":
            return self._reader.placeholder(node, index, self._facts)
        if not is_tensor(node):
            return self.number(node)
        read = call(node)
        rule = RULES.get(read.op)
        if self._steps > _MOST_STEPS:
            return self._reader.table(node, index)
        try:
            if private.leaves_region(node):
                return self.simplified(read_vmapped(self, node, index))
            if rule is None:
                return self._reader.table(node, index)
            found = self.simplified(rule(Reading(self, node, read, index)))
        except (OpaqueError, AlgebraError, KeyError):
            return self._reader.table(node, index)
        return found if found.sort is sort_of(node.meta["val"].dtype) else self._reader.table(node, index)

    def read(self, node: fx.Node, index: Index, by: fx.Node) -> Expr:
        seen = self._reader.versions.read(node, by)
        if seen is None:
            raise OpaqueError  # somebody wrote through an alias
        return self.value(seen, index)

    def number(self, x: Argument) -> Expr:
        seen = value(x)
        if isinstance(seen, bool | int | float):
            return const(seen)
        if isinstance(seen, torch.SymInt):
            return self._symbolic(private.formula(seen))
        if isinstance(x, fx.Node):
            return self._reader.table(x, ())
        raise OpaqueError

    def _symbolic(self, e: Argument) -> Expr:
        if e.is_Integer:
            return const(int(e))
        if e.is_Symbol:
            return self._reader.size(str(e))
        parts = [self._symbolic(x) for x in e.args]
        name = type(e).__name__
        if name in ("Add", "Mul"):
            total = parts[0]
            for part in parts[1:]:
                total = total + part if name == "Add" else total * part
            return self.simplified(total)
        if name in ("FloorDiv", "Mod", "PythonMod"):
            return parts[0] // parts[1] if name == "FloorDiv" else parts[0] % parts[1]
        raise OpaqueError

    def simplified(self, e: Expr) -> Expr:
        if e not in self._simple:
            self._simple[e] = simplify(e, self._facts)
        return self._simple[e]

    def fresh(self, size: Size) -> Expr:
        place = symbol(f"place{len(self._facts)}", Sort.INDEX)
        self._facts[place] = Interval(0, size - 1 if isinstance(size, int) else float("inf"))
        return place


def sizes(graph: fx.Graph) -> dict[str, Table]:
    """Where each symbol of a graph's shapes can be read."""
    found: dict[str, Table] = {}
    for node in graph.nodes:
        seen = value(node)
        if node.op == "placeholder" and isinstance(seen, torch.SymInt) and private.formula(seen).is_Symbol:
            found[str(seen)] = Table(node, Sort.INDEX)
        elif is_tensor(node):
            for dim, size in enumerate(shape(node)):
                if isinstance(size, torch.SymInt) and private.formula(size).is_Symbol:
                    found.setdefault(str(size), Table(node, Sort.INDEX, dim))
    return found
