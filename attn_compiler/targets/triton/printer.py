"""Prints expressions as Triton: what depends on one token alone is computed once for it, as a column or a row of a tile."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.bounds import ANY, Interval
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.notation import notation
from attn_compiler.targets.cpp.printer import Dialect, Leaves, Level, by_level, common, is_given, used
from attn_compiler.targets.cpp.spec import FIRST_KEY, FIRST_QUERY, SIZES, Stored, is_narrow
from attn_compiler.targets.operands import PLACE
from attn_compiler.targets.triton.distance import DISTANCE, DISTANCES

INSIDE = e.symbol("inside", Sort.BOOL)  # whether a column of a tile is a key, and not beyond the last one
LEAVES: Leaves = {
    INSIDE: ("(column < k_len)", Level.ROW),
    **{leaf: (str(leaf.value), Level.TASK) for leaf in (e.b, e.h, e.kv, e.heads, e.q_len, e.k_len, e.layer, e.layers)},
    **{leaf: (str(leaf.value), Level.TASK) for leaf in (FIRST_QUERY, FIRST_KEY)},
    e.dim: ("DIM", Level.TASK),
    e.i: ("i", Level.LANE),
    DISTANCE: ("distance", Level.PAIR),
    PLACE: ("j", Level.ROW),
    e.q_norm: ("norm(queries)", Level.LANE),
    e.k_norm: ("norm(keys).T", Level.ROW),
    e.peak: ("peak", Level.LANE),
    e.mass: ("mass", Level.LANE),
    e.score: ("score", Level.PAIR),
    e.dot: ("dot", Level.PAIR),
}
_NAMES: Mapping[Expr, str] = {
    e.i + FIRST_QUERY: "q_position",
    PLACE + FIRST_KEY: "k_position",
    e.q_norm: "q_norm",
    e.k_norm: "k_norm",
}
_NORMS = (e.q_norm, e.k_norm)
_COMPARISONS = ("lt", "le", "eq")
LEVELS = (Level.TASK, Level.LANE, Level.ROW, Level.PAIR)  # a flag iterates over its bits only
LOG2E = math.log2(math.e)
_LONG = 80  # characters of a line


@dataclass
class Printer:
    """Collects what is computed once per head, query or key while the statements of one kernel are printed."""

    dialect: Dialect
    tables: Mapping[str, tuple[str, Stored]]  # by name: what the kernel calls it
    names: Mapping[Expr, str]  # what people call some parts of the variant
    taken: set[str]  # names that mean something in the skeleton
    leaves: Leaves = field(default_factory=lambda: LEAVES)
    axes: tuple[Level, Level] = (Level.LANE, Level.ROW)  # what the rows of a tile are, and the columns
    _wide: dict[Expr, bool] = field(default_factory=dict)
    _held: dict[tuple[Expr, str], str] = field(default_factory=dict)
    _statements: dict[Level, list[str]] = field(default_factory=lambda: {level: [] for level in LEVELS})

    def assign(self, name: str, root: Expr, real: str = "real") -> list[str]:
        """The statements that compute `root` and call it `name`; `real` is the type of its real numbers."""
        root = by_level(root, self.level)
        body = _Body(self, real, Counter(used([root])))
        written = body.written(root, Level.PAIR)
        return [*body.statements, *_broken(f"{name} = {written}")]

    def addition(self, read: Expr, value: Expr, inside: str = "") -> list[str]:
        """The statements that add `value` to the gradient of a table, where it was read: first along what shares a number.

        What does not stand `inside` is left out.
        """
        value = by_level(value, self.level)
        body = _Body(self, "real", Counter(used([read, value])))
        places = [body.text(x, Level.PAIR) for x in read.args]
        level = Level.TASK
        for x in read.args:
            level |= self.level(x)
        name, written = self.tables[str(read.value)][0], body.text(value, Level.PAIR)
        written = f"tl.where({inside}, {written}, 0.0)" if inside else written
        for axis in [axis for axis, part in enumerate(self.axes) if part in self.level(value) and part not in level]:
            written = f"tl.sum({written}, {axis}, keep_dims=True)"
        at = "".join(f"{place}, " for place in places).strip()
        return [*body.statements, f"add(of_{name}, ({at}), {written})"]

    def scope(self, level: Level) -> list[str]:
        """The statements that compute what depends on `level` alone."""
        return self._statements[level]

    def elsewhere(self, leaves: Leaves) -> Printer:
        """The same where some leaves stand for something else; what is computed per head is for both."""
        return replace(self, leaves={**self.leaves, **leaves}, _held={})

    def level(self, node: Expr) -> Level:
        """What `node` depends on."""
        found = Level.TASK
        for leaf in node.symbols():
            found |= self.leaves[leaf][1]
        return found

    def held(self, node: Expr, real: str) -> str:
        """The name of a part that does not depend on the pair, computed where it varies."""
        key = self.key(node, real)
        if key not in self._held:
            body = _Body(self, key[1], Counter(used([node])))
            level = self.level(node)
            written = body.written(node, level)
            name = self.name(node)
            meaning = notation(node)
            remark = f"  # {meaning}" if meaning not in (name, written) and len(meaning) + len(written) < _LONG else ""
            self._held[key] = name
            self._statements[level] += [*body.statements, *_broken(f"{name} = {written}{remark}")]
        return self._held[key]

    def key(self, node: Expr, real: str) -> tuple[Expr, str]:
        """What is computed once: parts without real numbers do not care about their precision."""
        return node, real if any(part.sort is Sort.REAL for part in node.walk()) else "real"

    def is_held(self, node: Expr, real: str) -> bool:
        return self.key(node, real) in self._held

    def name(self, node: Expr) -> str:
        """What a part is called: by what it is, else by a number."""
        known = self.names.get(node) or _NAMES.get(node)
        if known is None and node.op == "table":
            known = f"{self.tables[str(node.value)][0]}_value"
        stem = known or ("holds" if node.sort is Sort.BOOL else "x")
        names = (
            (stem, *(f"{stem}{n}" for n in range(len(self.taken)))) if known else (f"{stem}{n}" for n in range(len(self.taken)))
        )
        return self.untaken(names)

    def untaken(self, names: Iterable[str]) -> str:
        """The first name that means nothing yet."""
        name = next(name for name in names if name not in self.taken)
        self.taken.add(name)
        return name

    def type(self, sort: Sort, real: str) -> str:
        """The type of a value."""
        return str(self.dialect["types"][real if sort is Sort.REAL else sort.value])

    def is_wide(self, node: Expr) -> bool:
        """Whether an index may need more than 32 bits."""
        if node not in self._wide:
            stored = {x: _RANGES.get(self.tables[str(x.value)][1].dtype, ANY) for x in node.walk() if x.op == "table"}
            self._wide[node] = node.sort is Sort.INDEX and not is_narrow(node, {**SIZES, **DISTANCES, **stored})
        return self._wide[node]


@dataclass
class _Body:
    """The statements of one scope that lead to one value."""

    printer: Printer
    real: str
    uses: Counter[Expr]
    statements: list[str] = field(default_factory=list)
    _texts: dict[Expr, str] = field(default_factory=dict)

    def text(self, node: Expr, here: Level) -> str:
        """`node` as a whole expression, within what depends on `here`."""
        if node not in self._texts:
            self._texts[node] = self._kept(node, self.written(node, here)) if self._belongs(node, here) else self._reached(node)
        return self._texts[node]

    def _belongs(self, node: Expr, here: Level) -> bool:
        if node in _NORMS:
            return False
        computed_here = self.printer.level(node) == here or is_given(node)
        return computed_here and not self.printer.is_held(node, self.real)

    def _reached(self, node: Expr) -> str:
        """What another scope computes."""
        if node.is_const or (node.op == "symbol" and node not in _NORMS):
            return self.written(node, Level.TASK)
        return self.printer.held(node, self.real)

    def _kept(self, node: Expr, written: str) -> str:
        """Where it is used again, or long, the name of a variable."""
        again = self.uses[node] > 1 and not _WHOLE.fullmatch(written)
        if not node.args or not (again or len(written) > _LONG) or node.op in ("and", "or"):
            return written
        name = self.printer.name(node)
        self.statements += _broken(f"{name} = {written}")
        return name

    def written(self, node: Expr, here: Level) -> str:
        """`node` as an expression of its operands."""
        if node.is_const:
            return _number(node)
        if node.op == "symbol":
            return self.printer.leaves[node][0]
        if node.op == "table":
            return self._read(node, here)
        if node.op == "not" and node.args[0].is_const:
            return str(not node.args[0].value)  # Python's `~True` is a number
        if node.op in self.printer.dialect["operators"]:
            operands = (self._operand(a, node, here, right=at > 0) for at, a in enumerate(node.args))
            return str(self.printer.dialect["operators"][node.op]).format(*operands)
        kind = self.printer.type(node.sort, self.real)
        if node.op == "real":
            return self._fitted(node.args[0], Sort.REAL, here)
        sorts = (Sort.BOOL if a.sort is Sort.BOOL else common(node) for a in node.args)
        args = (self._fitted(a, sort, here) for a, sort in zip(node.args, sorts, strict=True))
        return str(self.printer.dialect["functions"][node.op]).format(*args, type=kind)

    def _operand(self, node: Expr, of: Expr, here: Level, *, right: bool) -> str:
        """An operand of `of`, in parentheses where it would be torn apart."""
        widen = not right and self.printer.is_wide(of) and not any(map(self.printer.is_wide, of.args))
        text, binds = self._fitted(node, common(of), here, widen=widen), self.printer.dialect["binds"]
        if _WHOLE.fullmatch(text) or _CALL.fullmatch(text) or (node.op not in binds and not text.startswith("-")):
            return text
        inner, outer = (int(str(binds.get(op, binds["neg"]))) for op in (node.op, of.op))
        if of.op in ("and", "or"):
            return text if node.op in (of.op, "not") else f"({text})"
        chained = of.op in _COMPARISONS or right or of.op == "neg"
        return text if inner > outer or (inner == outer and not chained) else f"({text})"

    def _fitted(self, node: Expr, sort: Sort, here: Level, *, widen: bool = False) -> str:
        """`node` as an operand of a sort."""
        text = self.text(node, here)
        if widen:
            return f"tl.cast({text}, {self.printer.dialect['types']['wide']})"
        if node.sort is sort or sort is Sort.BOOL:
            return text
        if node.is_const:
            return _number(e.const(float(node.value)))  # type: ignore[arg-type]  # a number, since it is fitted
        return f"tl.cast({text}, {self.printer.type(sort, self.real)})"

    def _read(self, node: Expr, here: Level) -> str:
        name, stored = self.printer.tables[str(node.value)]
        places = "".join(f"{self.text(x, here)}, " for x in node.args)
        written = f"read({name}, ({places.strip() if len(node.args) == 1 else places[:-2]}))"
        fits = {Sort.BOOL: ("bool",), Sort.INDEX: ("int32", "int64"), Sort.REAL: (_STORED[self.real],)}[node.sort]
        return written if stored.dtype in fits else f"tl.cast({written}, {self.printer.type(node.sort, self.real)})"


_WHOLE = re.compile(r"[\w.]+")
_CALL = re.compile(r"[\w.]+\([^()]*\)")
_STORED = {"real": "float32", "exact": "float64"}
_RANGES = {"int64": ANY, **{f"{u}int{n}": Interval(-(1 << n), 1 << n) for n in (8, 16) for u in ("", "u")}}
_RANGES["int32"] = Interval(-(1 << 31), (1 << 31) - 1)


def _number(node: Expr) -> str:
    if node.sort is Sort.BOOL or node.sort is Sort.INDEX:
        return str(node.value)
    value = float(node.value)  # type: ignore[arg-type]
    if math.isinf(value):
        return "-INFINITY" if value < 0 else "INFINITY"
    return "LOG2E" if value == LOG2E else repr(value)


def _broken(statement: str) -> Sequence[str]:
    """The lines of a statement: a long one is broken before the operators that no parentheses hold together."""
    if len(statement) <= _LONG + 20:
        return [statement]
    name, _, value = statement.partition(" = ")
    depth, lines = 0, [""]
    for at, letter in enumerate(value):
        depth += (letter in "([") - (letter in ")]")
        if not depth and value.startswith((" & ", " | ", " + ", " - "), at):
            lines.append("   ")
        lines[-1] += letter
    return [statement] if len(lines) == 1 else [f"{name} = (", *(f"    {line.strip()}" for line in lines), ")"]
