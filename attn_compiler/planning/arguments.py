"""How each type of a word's parameters is read from the syntax tree of a text: one table."""

from __future__ import annotations

import ast
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NoReturn, Protocol, Union, get_args, get_origin

from attn_compiler.algebra.expr import Expr, Sort, b, k, k_len, table
from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.errors import LanguageError
from attn_compiler.planning.scope import Scope
from attn_compiler.planning.words import (
    Count,
    CountPerAxis,
    Denominator,
    FlagPerAxis,
    Label,
    Number,
    Order,
    PerAxis,
    PerToken,
    Seed,
    Seen,
    TableName,
    Tokens,
    Units,
)  # fmt: skip


class Reader(Protocol):
    """What reading an argument may ask of the parser."""

    @property
    def scope(self) -> Scope: ...

    def fail(self, node: ast.expr, message: str) -> NoReturn: ...
    def unknown(self, node: ast.expr, what: str, name: str) -> NoReturn: ...
    def mask(self, node: ast.expr) -> Seen: ...
    def scalar(self, node: ast.expr) -> Expr: ...
    def word(self, node: ast.expr, folder: str) -> object: ...


@dataclass(frozen=True)
class Argument:
    """What is expected, in words, and how it is read; `read` gives None where it finds something else."""

    expected: str
    read: Callable[[Reader, ast.expr], object | None]


def dotted(node: ast.expr) -> str | None:
    """The name `a` or `a.b` that a node is."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (head := dotted(node.value)):
        return f"{head}.{node.attr}"
    return None


def literal(node: ast.expr) -> object | None:
    """A number, text, truth value, or a list of them; None for all else."""
    try:
        return ast.literal_eval(node)  # type: ignore[no-any-return]
    except ValueError:
        return None


def read_argument(reader: Reader, node: ast.expr, hint: object) -> object:
    """Read a node as an argument of the annotated type."""
    kinds = [x for x in _alternatives(hint) if x is not type(None)]
    if isinstance(node, ast.Constant) and node.value is None and len(kinds) < len(_alternatives(hint)):
        return None
    arguments = [_argument(x) for x in kinds]
    for argument in arguments:
        found = argument.read(reader, node)
        if found is not None:
            return found if found is not LAYER else None
    return reader.fail(node, f"expected {' or '.join(a.expected for a in arguments)}")


def _alternatives(hint: object) -> tuple[object, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _argument(hint: object) -> Argument:
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return Argument(" or ".join(f'"{c}"' for c in choices), lambda _, node: _choice(node, choices))
    return ARGUMENTS[hint]


def _choice(node: ast.expr, choices: tuple[object, ...]) -> object | None:
    found = dotted(node) or literal(node)
    return found if found in choices else None


def _whole(least: int | None) -> Callable[[Reader, ast.expr], object | None]:
    def read(reader: Reader, node: ast.expr) -> int | None:
        name = dotted(node)
        found = reader.scope.values.get(name) if name else literal(node)
        return found if isinstance(found, int) and not isinstance(found, bool) and (least is None or found >= least) else None

    return read


def _per_axis(item: Callable[[Reader, ast.expr], object | None]) -> Callable[[Reader, ast.expr], object | None]:
    def read(reader: Reader, node: ast.expr) -> tuple[object, ...] | None:
        nodes = node.elts if isinstance(node, ast.List | ast.Tuple) else [node]
        found = tuple(item(reader, x) for x in nodes)
        return None if not found or None in found else found

    return read


def _flag(_: Reader, node: ast.expr) -> bool | None:
    found = literal(node)
    return found if isinstance(found, bool) else None


def _number(reader: Reader, node: ast.expr) -> Expr | None:
    found = reader.scalar(node)
    return None if found.sort is Sort.BOOL else found


def _float(_: Reader, node: ast.expr) -> float | None:
    found = literal(node)
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def _table_name(reader: Reader, node: ast.expr) -> str | None:
    found = dotted(node) or literal(node)
    if not isinstance(found, str):
        return None
    name = reader.scope.table_name(found)
    if not reader.scope.knows_table(name):
        reader.unknown(node, "table", found)
    return name


def _set(reader: Reader, node: ast.expr) -> IntegerSet | None:
    found = literal(node)
    if isinstance(found, bool) or not isinstance(found, int | str):
        return None
    try:
        return IntegerSet.parse(found)
    except LanguageError as error:
        reader.fail(node, str(error))


def _tokens(reader: Reader, node: ast.expr) -> PerToken | None:
    name = dotted(node)
    if name is None:
        found = _set(reader, node)
    else:
        role = reader.scope.roles.get(name, name)
        if isinstance(role, str):
            if not reader.scope.knows_table(role):
                reader.unknown(node, "role", name)
            return PerToken(table(role, b, k, sort=Sort.BOOL))
        found = role
    return None if found is None else PerToken(found.contains(k, k_len))


def _label(reader: Reader, node: ast.expr) -> PerToken | None:
    name = _table_name(reader, node)
    return None if name is None else PerToken(table(name, b, k))


def _units(reader: Reader, node: ast.expr) -> object | None:
    return reader.word(node, "units") if isinstance(node, ast.Call) else _label(reader, node)


LAYER = object()


def _seed(reader: Reader, node: ast.expr) -> object | None:
    if dotted(node) == "layer":
        return LAYER if reader.scope.layer is None else reader.scope.layer
    return _whole(0)(reader, node)


def _text(_: Reader, node: ast.expr) -> str | None:
    found = dotted(node) or literal(node)
    return found if isinstance(found, str) else None


ARGUMENTS: Mapping[object, Argument] = {
    Count: Argument("a whole number of at least 1", _whole(1)),
    int: Argument("a whole number", _whole(None)),
    float: Argument("a number", _float),
    bool: Argument("True or False", _flag),
    str: Argument("a name", _text),
    Number: Argument("a number or an expression", _number),
    TableName: Argument("the name of a table", _table_name),
    IntegerSet: Argument('a set of integers such as 3 or "0:4, -1"', _set),
    Tokens: Argument('a role, or a set of positions such as "0:4, -1"', _tokens),
    Label: Argument("the name of a label", _label),
    Units: Argument("block(n) or the name of a label", _units),
    Order: Argument("an order", lambda reader, node: reader.word(node, "orders")),
    Denominator: Argument("a denominator", lambda reader, node: reader.word(node, "denominators")),
    Seen: Argument("a mask", lambda reader, node: reader.mask(node)),
    Seed: Argument("a whole number of at least 0, or `layer`", _seed),
    PerAxis: Argument("a whole number, or a list of one for each axis", _per_axis(_whole(None))),
    CountPerAxis: Argument("a whole number of at least 1, or a list of one for each axis", _per_axis(_whole(1))),
    FlagPerAxis: Argument("True or False, or a list of one for each axis", _per_axis(_flag)),
}
