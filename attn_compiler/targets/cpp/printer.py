"""Prints expressions as C++: what depends on one token alone is computed once for it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntFlag

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.notation import notation
from attn_compiler.targets.cpp.spec import FIRST_KEY, FIRST_QUERY, Stored
from attn_compiler.targets.operands import PLACE

Dialect = Mapping[str, Mapping[str, object]]


class Level(IntFlag):
    """What an expression depends on besides the task (one head of one row): the token in a lane, the one in a row, both."""

    TASK = 0
    LANE = 1
    ROW = 2
    PAIR = 3


_NAMES: Mapping[Expr, tuple[str, Level]] = {
    e.b: ("task.b", Level.TASK),
    e.h: ("task.h", Level.TASK),
    e.kv: ("task.kv", Level.TASK),
    **{leaf: (f"(index_t)call.{leaf.value}", Level.TASK) for leaf in (e.heads, e.q_len, e.k_len, e.layer, e.layers)},
    FIRST_QUERY: ("(index_t)call.first_query", Level.TASK),
    FIRST_KEY: ("(index_t)call.first_key", Level.TASK),
    e.dim: ("(index_t)DIM", Level.TASK),
    e.i: ("lane", Level.LANE),
    PLACE: ("row", Level.ROW),
    e.q_norm: ("norms_of(lanes.data + n * LANES, DIM)", Level.LANE),
    e.k_norm: ("norm_of(rows.data[j], DIM)", Level.ROW),
    e.peak: ("peak", Level.LANE),
    e.mass: ("mass", Level.LANE),
    e.score: ("score", Level.PAIR),
    e.dot: ("dot", Level.PAIR),
}
_HELD = {Level.TASK: ("task", ""), Level.LANE: ("lanes", "[n]"), Level.ROW: ("rows", "[j]")}
_GIVEN = (e.peak, e.mass, e.score, e.dot)  # arguments of the function that is printed: never computed ahead


@dataclass
class Scope:
    """What is computed once per task, lane or row: fields of a structure, and the statements that fill them."""

    fields: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=list)


@dataclass
class Printer:
    """Collects the scopes of one kernel while its functions are printed."""

    dialect: Dialect
    tables: Mapping[str, tuple[int, Stored]]  # by name: the number under which the kernel knows it
    scopes: dict[Level, Scope] = field(default_factory=lambda: {level: Scope() for level in _HELD})
    _held: dict[tuple[Expr, str], str] = field(default_factory=dict)

    def function(self, root: Expr, real: str = "real") -> list[str]:
        """The statements of a function that returns `root` as a vector; `real` is the type of its real numbers."""
        body = _Body(self, real, None, root)
        result = body.vector(root)
        return [*body.statements, f"return {result};"]

    def held(self, node: Expr, real: str, level: Level) -> str:
        """The field that holds a part which does not depend on the pair."""
        key = (node, real)
        if key not in self._held:
            body = _Body(self, real, level, node)
            text = body.text(node)
            owner, index = _HELD[level]
            number = sum(1 for name in self._held.values() if name.startswith(f"{owner}."))
            name = f"{owner}.x{number}"
            size = {Level.TASK: "", Level.LANE: "[VECTORS]", Level.ROW: "[CHUNK]"}[level]
            scope = self.scopes[level]
            scope.fields.append(f"{self.type(node, real, level)} x{number}{size};  // {notation(node)}")
            scope.values += [*body.statements, f"{name}{index} = {text};"]
            self._held[key] = name + index
        return self._held[key]

    def type(self, node: Expr, real: str, level: Level) -> str:
        """The type of a value: a vector where it depends on the lane."""
        names = self.dialect["types"][real if node.sort is Sort.REAL else node.sort.value]
        assert isinstance(names, Sequence)
        return str(names[bool(level & Level.LANE)])


def level_of(node: Expr) -> Level:
    """What `node` depends on."""
    found = Level.TASK
    for leaf in node.symbols():
        found |= _NAMES[leaf][1]
    return found


@dataclass
class _Body:
    """The statements of one function, or of what fills the fields of one level."""

    printer: Printer
    real: str
    level: Level | None
    root: Expr
    statements: list[str] = field(default_factory=list)
    _texts: dict[Expr, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._uses = Counter(a for node in self.root.walk() for a in node.args)

    def text(self, node: Expr) -> str:
        """`node` as an operand: a name, a number, a call, or an operation in parentheses."""
        if node not in self._texts:
            written = self._written(node)
            if node.args and self._uses[node] > 1 and not written.startswith(_FIELDS):
                kind, name = self.printer.type(node, self.real, level_of(node)), f"t{len(self.statements)}"
                self.statements.append(f"const {kind} {name} = {written};")
                written = name
            self._texts[node] = written
        return self._texts[node]

    def operand(self, node: Expr) -> str:
        """The same, in parentheses where an operator could tear it apart."""
        text = self.text(node)
        whole = _WHOLE.fullmatch(text) or (node.op in _COMPARISONS and text.startswith("truth("))
        return text if whole or node.op not in self.printer.dialect["operators"] else f"({text})"

    def vector(self, node: Expr) -> str:
        """The same, in every lane."""
        return self._fitted(node, node.sort, Level.LANE, self.text(node))

    def _written(self, node: Expr) -> str:
        if node.op == "const":
            return _number(node, self.real)
        level = level_of(node)
        if level is not Level.PAIR and level != self.level and not node.mentions(*_GIVEN) and node.op != "symbol":
            return self.printer.held(node, self.real, level)
        if node.op == "symbol":
            return self._symbol(node, level)
        if node.op == "table":
            return self._read(node, level)
        return self._operation(node, level)

    def _symbol(self, node: Expr, level: Level) -> str:
        name, _ = _NAMES[node]
        measured = node in (e.q_norm, e.k_norm)
        return self.printer.held(node, self.real, level) if measured and level != self.level else name

    def _operation(self, node: Expr, level: Level) -> str:
        operands = [a.sort for a in node.args]
        common = Sort.REAL if Sort.REAL in operands or node.op in _ON_REALS else Sort.INDEX
        dialect, vector = self.printer.dialect, Level.LANE & level
        if node.op == "real":
            return self._fitted(node.args[0], Sort.REAL, vector, self.text(node.args[0]))
        in_function = node.op in dialect["functions"]
        lift = vector if in_function or Sort.BOOL in operands else Level.TASK
        spell = self.text if in_function else self.operand
        args = [self._fitted(a, Sort.BOOL if a.sort is Sort.BOOL else common, lift, spell(a)) for a in node.args]
        if in_function and not vector:
            args = [f"(index_t){x}" if a.is_const and common is Sort.INDEX else x for a, x in zip(node.args, args, strict=True)]
        form = dialect["functions" if in_function else "operators"][node.op]
        written = str(form).format(*args)
        if node.op in ("ceil", "floor"):
            return f"convert<{self.printer.type(node, self.real, level)}>({written})"
        return f"truth({written})" if vector and node.op in _COMPARISONS else written

    def _fitted(self, node: Expr, sort: Sort, vector: Level, text: str) -> str:
        """The `text` of `node` as an operand of a sort; with `vector`, in every lane."""
        level, wanted = level_of(node), e.symbol("", sort)
        if node.sort is not sort:
            text = f"convert<{self.printer.type(wanted, self.real, level)}>({text})"
        if not vector or level & Level.LANE:
            return text
        return f"truth({text})" if sort is Sort.BOOL else f"splat<{self.printer.type(wanted, self.real, Level.LANE)}>({text})"

    def _read(self, node: Expr, level: Level) -> str:
        number, stored = self.printer.tables[str(node.value)]
        table = f"call.tables[{number}]"
        places = [f"{table}.within({axis}, {self.text(x)})" for axis, x in enumerate(node.args)]
        stored_as = self.printer.dialect["stored"][stored.dtype]
        kind = self.printer.type(node, self.real, level)
        written = f"read<{kind}, {stored_as}>({table}, {' + '.join(places) or '0'})"
        return f"truth({written} != 0)" if node.sort is Sort.BOOL and level & Level.LANE else written


_FIELDS = ("task.", "lanes.", "rows.")
_WHOLE = re.compile(r"[\w.]+(\[\w\])?")
_COMPARISONS = ("lt", "le", "eq")
_ON_REALS = ("div", "pow", "exp", "log", "sqrt", "tanh", "sigmoid", "ceil", "floor")


def _number(node: Expr, real: str) -> str:
    if node.sort is Sort.BOOL:
        return "true" if node.value else "false"
    if node.sort is Sort.INDEX:
        return str(node.value)
    value = float(node.value)  # type: ignore[arg-type]
    if math.isinf(value):
        return "-INFINITY" if value < 0 else "INFINITY"
    return f"{value!r}f" if real == "real" else repr(value)
