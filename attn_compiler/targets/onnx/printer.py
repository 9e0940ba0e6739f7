"""Prints expressions as ONNX nodes: numbers stay numbers, and nothing grows along a coordinate that it does not depend on."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import cast

import onnx_ir as ir

from attn_compiler.algebra.evaluate import PYTHON
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.library import folder
from attn_compiler.targets.onnx.nodes import DTYPES, Nodes, Value, type_of

Leaf = Callable[[Expr, Sequence[Value]], Value]  # what a symbol or a table is, read at these places


@dataclass
class Printer:
    """Prints into `nodes`; `leaf` says what the symbols and tables are, real numbers are held as `real`.

    Inside of a loop, what mentions none of the symbols that `varies` names is printed once, by the printer `outer`.
    """

    nodes: Nodes
    leaf: Leaf
    real: str
    outer: Printer | None = None
    varies: frozenset[Expr] = frozenset()
    _known: dict[Expr, Value] = field(default_factory=dict)

    def read(self, expression: Expr, known: Mapping[Expr, Value] | None = None) -> Value:
        """What `expression` is; `known` are sub-expressions that were computed already, and hold for this call only."""
        mine = set(known or {})
        done: dict[Expr, Value] = dict(known or {})
        for node in expression.walk():
            depends = node in mine or any(a in mine for a in node.args)
            if depends:
                mine.add(node)
            found = done if depends else self._known
            if node not in found:
                found[node] = self._evaluated(node, [done[a] for a in node.args], depends)
            done[node] = found[node]
        return done[expression]

    def tensor(self, value: Value, sort: Sort) -> ir.Value:
        """A value as a tensor."""
        return value if isinstance(value, ir.Value) else self.nodes.constant(value, type_of(sort, self.real))

    def real_tensor(self, expression: Expr, known: Mapping[Expr, Value] | None = None) -> ir.Value:
        """A real expression as a tensor of real numbers."""
        return self._fitted(self.read(expression, known), expression.sort, Sort.REAL)

    def _evaluated(self, node: Expr, args: list[Value], depends: bool) -> Value:
        if self.outer and not depends and not node.mentions(*self.varies):
            return self.outer.read(node)
        if node.op == "const":
            assert not isinstance(node.value, str | None)
            return node.value
        if node.op in ("symbol", "table"):
            return self.leaf(node, args)
        numbers = [a for a in args if not isinstance(a, ir.Value)]
        if len(numbers) == len(args):
            try:
                return PYTHON[node.op](*numbers)
            except (ArithmeticError, ValueError):  # 1 / 0, log(0): infinite or NaN in a tensor, an exception in Python
                pass
        return self._written(node, args)

    def _written(self, node: Expr, args: list[Value]) -> ir.Value:
        sorts = [a.sort for a in node.args]
        chosen = sorts[1:] if node.op == "where" else sorts
        on_reals = Sort.REAL in (*chosen, node.sort) or node.op in ("ceil", "floor")
        common = Sort.REAL if on_reals else chosen[0]
        operands = [self._fitted(a, s, Sort.BOOL if s is Sort.BOOL else common) for a, s in zip(args, sorts, strict=True)]
        return self.spelled(_spelling(node.op, common.value), operands)

    def _fitted(self, value: Value, sort: Sort, wanted: Sort) -> ir.Value:
        if not isinstance(value, ir.Value) or sort is wanted:
            return self.tensor(value, wanted)
        return self.nodes.op("Cast", value, to=int(DTYPES[type_of(wanted, self.real)]))

    def spelled(self, call: ast.expr, operands: Sequence[ir.Value]) -> ir.Value:
        """Write the calls of a line of the dialect."""
        if isinstance(call, ast.Name):
            return operands["abc".index(call.id)]
        assert isinstance(call, ast.Call)
        assert isinstance(call.func, ast.Name)
        attributes = {
            str(word.arg): int(DTYPES[type_of(Sort(cast(ast.Name, word.value).id), self.real)]) for word in call.keywords
        }
        return self.nodes.op(call.func.id, *(self.spelled(a, operands) for a in call.args), **attributes)


@lru_cache
def _dialect() -> Mapping[str, Mapping[str, str]]:
    return tomllib.loads((folder("codegen") / "onnx" / "dialect.toml").read_text(encoding="utf-8"))


@lru_cache
def _spelling(op: str, sort: str) -> ast.expr:
    dialect = _dialect()
    return ast.parse(dialect[sort].get(op) or dialect["any"][op], mode="eval").body
