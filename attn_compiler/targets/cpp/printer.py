"""Prints expressions as C++: what depends on one token alone is computed once for it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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


Leaves = Mapping[Expr, tuple[str, Level]]  # how a leaf is reached, and what it depends on

_COUNTED = (e.heads, e.q_len, e.k_len, e.layer, e.layers, FIRST_QUERY, FIRST_KEY)
_NORMS = (e.q_norm, e.k_norm)
LEAVES: Leaves = {
    e.b: ("task.b", Level.TASK),
    e.h: ("task.h", Level.TASK),
    e.kv: ("task.kv", Level.TASK),
    e.dim: ("DIM", Level.TASK),
    **{leaf: (f"(index_t)task.call.{leaf.value}", Level.TASK) for leaf in _COUNTED},
    e.i: ("lanes.lane[n]", Level.LANE),
    PLACE: ("rows.row[j]", Level.ROW),
    e.q_norm: ("norms_of(lanes.data + n * LANES, DIM)", Level.LANE),
    e.k_norm: ("norm_of(rows.data[j], DIM)", Level.ROW),
    e.peak: ("peak", Level.LANE),
    e.mass: ("mass", Level.LANE),
    e.score: ("score", Level.PAIR),
    e.dot: ("dot", Level.PAIR),
}
KEYS_IN_LANES: Leaves = {
    **LEAVES,
    e.i: ("rows.row[j]", Level.ROW),
    PLACE: ("lanes.lane[n]", Level.LANE),
    e.q_norm: ("norm_of(rows.data[j], DIM)", Level.ROW),
    e.k_norm: ("norms_of(lanes.data + n * LANES, DIM)", Level.LANE),
}
_NAMES: Mapping[Expr, str] = {
    e.i + FIRST_QUERY: "position",
    PLACE + FIRST_KEY: "position",
    **{leaf: str(leaf.value) for leaf in _COUNTED},
    e.q_norm: "norm",
    e.k_norm: "norm",
}
_OWNERS = {
    Level.TASK: ("task.{}", "{}"),
    Level.LANE: ("lanes.{}[n]", "{}[VECTORS]"),
    Level.ROW: ("rows.{}[j]", "{}[CHUNK]"),
}  # how a field is reached and declared


@dataclass
class Printer:
    """Collects what is computed once per task, lane or row while the functions of one kernel are printed."""

    dialect: Dialect
    tables: Mapping[str, tuple[int, Stored]]  # by name: the number under which the kernel knows it
    wide: bool  # whether indices have 64 bits
    names: Mapping[Expr, str]  # what people call some parts of the variant
    leaves: Leaves = field(default_factory=lambda: LEAVES)
    _fields: dict[Level, dict[tuple[Expr, str], str]] = field(default_factory=lambda: {level: {} for level in _OWNERS})

    def function(self, root: Expr, real: str = "real") -> list[str]:
        """The statements of a function that returns `root` as a vector; `real` is the type of its real numbers."""
        root = by_level(root, self.level)
        body = _Body(self, real, None, Counter(used([root])))
        result = body.vector(root)
        return [*body.statements, *_broken(f"return {result};")]

    def addition(self, read: Expr, value: Expr) -> list[str]:
        """The statements that add `value` to the gradient of a table, where it was read."""
        value = by_level(value, self.level)
        body = _Body(self, "real", None, Counter(used([read, value])))
        number, _ = self.tables[str(read.value)]
        places, added = ", ".join(body.text(x) for x in read.args), body.vector(value)
        adding = f"add(given, {number}, given.sums[{number}].at({places}), {added});"
        return ["{", *(f"  {line}" for line in (*body.statements, *_broken(adding))), "}"]

    def level(self, node: Expr) -> Level:
        """What `node` depends on."""
        found = Level.TASK
        for leaf in node.symbols():
            found |= self.leaves[leaf][1]
        return found

    def scope(self, level: Level) -> tuple[list[str], list[str]]:
        """The fields of one level, and the statements that fill them. Ask for TASK last: others add to it."""
        fields, declared, statements, names = self._fields[level], list[str](), list[str](), set[str]()
        for real in ("real", "exact"):
            roots = [node for node, kind in fields if kind == real]
            body = _Body(self, real, level, Counter(used(roots)), statements, names)
            for node in roots:
                body.text(node)
        for (node, real), name in fields.items():
            meaning = notation(node)
            remark = f"  // {meaning}" if meaning not in (name, "") and len(meaning) < _LONG else ""
            declared.append(f"{self.type(node.sort, real, level)} {_OWNERS[level][1].format(name)};{remark}")
        return declared, statements

    def held(self, node: Expr, real: str, level: Level) -> str:
        """The field that holds a part which does not depend on the pair."""
        fields = self._fields[level]
        key = self.key(node, real)
        if key not in fields:
            fields[key] = self.name(node, set(fields.values()))
        return _OWNERS[level][0].format(fields[key])

    def key(self, node: Expr, real: str) -> tuple[Expr, str]:
        """What is one field: parts without real numbers do not care about their precision."""
        return node, real if any(part.sort is Sort.REAL for part in node.walk()) else "real"

    def is_held(self, node: Expr, real: str, level: Level) -> bool:
        return self.key(node, real) in self._fields[level]

    def name(self, node: Expr, taken: set[str]) -> str:
        """What a part is called among others: by what it is, else by a number."""
        known = self.names.get(node) or _NAMES.get(node)
        if known is None and node.op == "table":
            known = re.sub(r"\W", "_", str(node.value)) + "_value"
        if known and known not in taken:
            return known
        stem = known or ("holds" if node.sort is Sort.BOOL else "x")
        return next(name for name in (f"{stem}{n}" for n in range(len(taken) + 1)) if name not in taken)

    def type(self, sort: Sort, real: str, level: Level) -> str:
        """The type of a value: a vector where it depends on the lane."""
        kinds = self.dialect["types"][real if sort is Sort.REAL else sort.value]
        assert isinstance(kinds, Sequence)
        return str(kinds[bool(level & Level.LANE)])


@dataclass
class _Body:
    """The statements of one function, or of what fills the fields of one level."""

    printer: Printer
    real: str
    level: Level | None
    uses: Counter[Expr]
    statements: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    _texts: dict[Expr, str] = field(default_factory=dict)

    def text(self, node: Expr) -> str:
        """`node` as a whole expression: where it is used again, or long, the name of a constant."""
        if node not in self._texts:
            here = self.level is not None and self.printer.is_held(node, self.real, self.level)
            self._texts[node] = self._field(node) if here else self._kept(node, self._written(node))
        return self._texts[node]

    def vector(self, node: Expr) -> str:
        """The same, in every lane."""
        return self._fitted(node, node.sort, Level.LANE, self._written(node))

    def _field(self, node: Expr) -> str:
        """A field of this level, filled by now."""
        assert self.level is not None
        name = self.printer.held(node, self.real, self.level)
        if self.printer.key(node, self.real)[1] == self.real:  # else it was filled with the others of its kind
            self.statements += _broken(f"{name} = {self._written(node)};")
        return name

    def _kept(self, node: Expr, written: str) -> str:
        again = self.uses[node] > 1 and not _WHOLE.fullmatch(written)
        if not node.args or not (again or len(written) > _LONG) or node.op in ("and", "or"):
            return written
        name = self.printer.name(node, self.names)
        self.names.add(name)
        kind = self.printer.type(node.sort, self.real, self.printer.level(node))
        self.statements += _broken(f"const {kind} {name} = {written};")
        return name

    def _written(self, node: Expr) -> str:
        if node.is_const:
            return _number(node, self.real)
        level = self.printer.level(node)
        if node.op == "symbol" and (level == self.level or node not in (*_COUNTED, *_NORMS)):
            return self.printer.leaves[node][0]
        if level is not Level.PAIR and level != self.level and not is_given(node):
            return self.printer.held(node, self.real, level)
        if node.op == "table":
            return self._read(node, level)
        if node.op == "real":
            return self._fitted(node.args[0], Sort.REAL, Level.LANE & level, self.text(node.args[0]))
        return self._operator(node, level) if node.op in self.printer.dialect["operators"] else self._function(node, level)

    def _operator(self, node: Expr, level: Level) -> str:
        sort, vector = common(node), Level.LANE & level
        lift = vector if sort is Sort.BOOL else Level.TASK
        args = [self._operand(a, sort, lift, node.op, right=at > 0) for at, a in enumerate(node.args)]
        written = str(self.printer.dialect["operators"][node.op]).format(*args)
        as_truth = self.real == "real" if sort is Sort.REAL else not self.printer.wide
        return written if node.op not in _COMPARISONS or not vector or as_truth else f"truth({written})"

    def _operand(self, node: Expr, sort: Sort, lift: Level, of: str, *, right: bool) -> str:
        """An operand of `of`, in parentheses where it would be torn apart."""
        text = self.text(node)
        fitted = self._fitted(node, sort, lift, text)
        binds = self.printer.dialect["binds"]
        call = node.op not in binds or (node.op in _COMPARISONS and text.startswith("truth("))
        if fitted != text or _WHOLE.fullmatch(text) or (call and not node.is_const):
            return fitted
        inner, outer = (int(str(binds.get(op, binds["neg"]))) for op in (node.op, of))
        if of in ("and", "or"):
            return text if node.op in (of, "not") else f"({text})"
        return text if inner > outer or (inner == outer and not right and of != "neg") else f"({text})"

    def _function(self, node: Expr, level: Level) -> str:
        operands, vector, choice = common(node), Level.LANE & level, node.op == "where"
        kind = self.printer.type(node.sort, self.real, level)
        args = []
        for at, a in enumerate(node.args):
            sort = Sort.BOOL if a.sort is Sort.BOOL else operands
            # A function is of the type of its first operand; a choice is told its type.
            lift = vector if (at > 0 and sort is Sort.BOOL if choice else not at) else Level.TASK
            args.append(self._fitted(a, sort, lift, self.text(a)))
        if self.printer.wide and operands is Sort.INDEX and not vector and not choice:
            args = [f"(index_t){text}" if a.is_const else text for a, text in zip(node.args, args, strict=True)]
        written = str(self.printer.dialect["functions"][node.op]).format(*args, type=kind)
        return f"convert<{kind}>({written})" if node.op in ("ceil", "floor") else written

    def _fitted(self, node: Expr, sort: Sort, vector: Level, text: str) -> str:
        """The `text` of `node` as an operand of a sort; with `vector`, in every lane."""
        level = self.printer.level(node)
        kind = self.printer.type(sort, self.real, level)
        if node.sort is not sort and node.is_const:
            text = _number(e.const(float(node.value)), self.real)  # type: ignore[arg-type]  # a number, since it is fitted
        elif node.sort is not sort and level & Level.LANE:
            text = f"convert<{kind}>({text})"
        elif node.sort is not sort:
            text = f"({kind}){text if _WHOLE.fullmatch(text) else f'({text})'}"
        if not vector or level & Level.LANE:
            return text
        return f"truth({text})" if sort is Sort.BOOL else f"splat<{self.printer.type(sort, self.real, Level.LANE)}>({text})"

    def _read(self, node: Expr, level: Level) -> str:
        number, stored = self.printer.tables[str(node.value)]
        places = ", ".join([f"task.call.tables[{number}]", *(self.text(x) for x in node.args)])
        stored_as = self.printer.dialect["stored"][stored.dtype]
        written = f"read<{self.printer.type(node.sort, self.real, level)}, {stored_as}>({places})"
        return f"({written} != 0)" if node.sort is Sort.BOOL and level & Level.LANE else written


_WHOLE = re.compile(r"[\w.]+(\[\w+\])?")
_COMPARISONS = ("lt", "le", "eq")
_ON_REALS = ("div", "pow", "exp", "log", "sqrt", "tanh", "sigmoid", "ceil", "floor")
_LONG = 80  # characters of a line


def is_given(node: Expr) -> bool:
    """Whether a part needs arguments of the function that is printed, so that it is never computed ahead."""
    return any(leaf.sort is Sort.REAL and leaf not in _NORMS for leaf in node.symbols())


def by_level(root: Expr, level: Callable[[Expr], Level]) -> Expr:
    """Conditions in the order of what they depend on, so that those of one token alone become one."""
    levels = (Level.TASK, Level.LANE, Level.ROW, Level.PAIR)  # a flag iterates over its bits only

    def change(node: Expr) -> Expr:
        if node.op not in ("and", "or"):
            return node
        parts = _chain(node, node.op)
        of_level = [[part for part in parts if level(part) == wanted] for wanted in levels]
        return _joined([_joined(part, node.op) for part in of_level if part], node.op)

    return root.transform(change)


def common(node: Expr) -> Sort:
    """The sort of the operands of an operation, once they are brought to one; of a choice, of what is chosen from."""
    sorts = [a.sort for a in (node.args[1:] if node.op == "where" else node.args)]
    if Sort.BOOL in sorts:
        return Sort.BOOL
    return Sort.REAL if Sort.REAL in sorts or node.op in _ON_REALS else Sort.INDEX


def used(roots: Sequence[Expr]) -> list[Expr]:
    """The operands of all that the roots are made of, as often as they are used."""
    return [a for node in dict.fromkeys(part for root in roots for part in root.walk()) for a in node.args]


def _chain(node: Expr, op: str) -> list[Expr]:
    return [part for a in node.args for part in _chain(a, op)] if node.op == op else [node]


def _joined(parts: Sequence[Expr], op: str) -> Expr:
    whole = parts[0]
    for part in parts[1:]:
        whole = e.apply(op, whole, part)
    return whole


def _broken(statement: str) -> list[str]:
    """The lines of a statement: a long one is broken before the operators that no parentheses hold together."""
    if len(statement) <= _LONG + 20:
        return [statement]
    depth, lines = 0, [""]
    for at, letter in enumerate(statement):
        depth += (letter in "([") - (letter in ")]")
        if not depth and statement.startswith((" & ", " | "), at):
            lines.append("   ")
        lines[-1] += letter
    return lines


def _number(node: Expr, real: str) -> str:
    if node.sort is Sort.BOOL:
        return "true" if node.value else "false"
    if node.sort is Sort.INDEX:
        return str(node.value)
    value = float(node.value)  # type: ignore[arg-type]
    if math.isinf(value):
        return "-INFINITY" if value < 0 else "INFINITY"
    return f"{value!r}f" if real == "real" else repr(value)
