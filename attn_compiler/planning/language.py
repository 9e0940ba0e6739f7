"""Reads masks, expressions and words of the policy language from text; nothing in a text is ever executed."""

from __future__ import annotations

import ast
import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Operand, Sort
from attn_compiler.errors import AlgebraError, LanguageError, did_you_mean
from attn_compiler.planning.arguments import dotted, read_argument
from attn_compiler.planning.scope import Scope
from attn_compiler.planning.words import Seen, Word, Words, plain

__all__ = ["Scope", "parse_call", "parse_expression", "parse_mask"]

LEAVES: Mapping[str, Expr] = {
    str(x.value): x for x in (e.b, e.h, e.kv, e.q, e.k, e.q_len, e.k_len, e.heads, e.dim, e.layer, e.layers, e.score)
}
FUNCTIONS: Mapping[str, tuple[int, Callable[..., Expr]]] = {
    **{f.__name__: (1, f) for f in (e.exp, e.log, e.sqrt, e.tanh, e.sigmoid)},
    "abs": (1, lambda x: e.apply("abs", x)),
    "min": (2, e.minimum),
    "max": (2, e.maximum),
    "where": (3, e.where),
}
ARITHMETIC: Mapping[type[ast.operator], str] = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.Pow: "pow", ast.FloorDiv: "floordiv", ast.Mod: "mod",
    ast.BitAnd: "and", ast.BitOr: "or",
}  # fmt: skip
COMPARISONS: Mapping[type[ast.cmpop], Callable[[Expr, Expr], Expr]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: e.same, ast.NotEq: lambda x, y: ~e.same(x, y),
}  # fmt: skip


def parse_mask(text: str, words: Words, scope: Scope) -> Seen:
    """Read `causal & (window(1024) | sinks(4))`."""
    reader = _Reader(_one_line(text), words, scope)
    return reader.mask(reader.tree())


def parse_expression(text: str, words: Words, scope: Scope) -> Expr:
    """Read `softcap(score, 50) + alibi()`, or a scale such as `alpha[h] / sqrt(dim)`."""
    reader = _Reader(_one_line(text), words, scope)
    return reader.scalar(reader.tree())


def parse_call(text: str, folder: str, words: Words, scope: Scope) -> object:
    """Read a word of a folder with its arguments: an order, a normalizer, a feature …"""
    reader = _Reader(_one_line(text), words, scope)
    return reader.word(reader.tree(), folder)


def _one_line(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True)
class _Reader:
    text: str
    words: Words
    scope: Scope

    def tree(self) -> ast.expr:
        try:
            return ast.parse(self.text, mode="eval").body
        except (SyntaxError, ValueError) as error:
            offset = getattr(error, "offset", None) or len(self.text) + 1  # Python gives 0 where the text ends too early
            message = getattr(error, "msg", None) or str(error)
            raise LanguageError(self._pointing(offset - 1, f"this is no expression: {message}")) from None
        except (RecursionError, MemoryError):
            raise LanguageError("an expression is nested too deeply") from None

    def fail(self, node: ast.expr, message: str) -> NoReturn:
        column = len(self.text.encode()[: node.col_offset].decode())
        found = ast.get_source_segment(self.text, node)
        said = message if f'"{found}"' in message else f"{message}, found `{found}`"
        raise LanguageError(self._pointing(column, said))

    def unknown(self, node: ast.expr, what: str, name: str) -> NoReturn:
        self.fail(node, f'there is no {what} "{name}"{did_you_mean(name, self.scope.names())}')

    def _pointing(self, column: int, message: str) -> str:
        return f"column {column + 1}: {message}\n    {self.text}\n    {' ' * column}^"

    # Masks

    def mask(self, node: ast.expr) -> Seen:
        match node:
            case ast.BinOp(left, ast.BitAnd() | ast.BitOr() as op, right):
                return self._joined(node, self.mask(left), self.mask(right), isinstance(op, ast.BitAnd))
            case ast.UnaryOp(ast.Invert(), operand):
                one = self._without_extra_keys(operand, self.mask(operand))
                return Seen(~one.keep, derived=one.derived)
            case ast.BoolOp(op, _):
                sign = "`&` instead of `and`" if isinstance(op, ast.And) else "`|` instead of `or`"
                self.fail(node, f"write {sign}")
            case ast.UnaryOp(ast.Not(), _):
                self.fail(node, "write `~` instead of `not`")
            case ast.Name() | ast.Attribute() | ast.Call():
                return self._seen(node, self.word(node, "masks"))
        return self.fail(node, "expected a mask: atoms such as causal or window(256), joined by `&`, `|`, `~`")

    def _seen(self, node: ast.expr, found: object) -> Seen:
        if isinstance(found, Seen | Expr):
            seen = plain(found)
            if seen.keep.sort is Sort.BOOL:
                return seen
        return self.fail(node, "a word for masks must give a truth value or Seen")

    def _joined(self, node: ast.BinOp, left: Seen, right: Seen, both: bool) -> Seen:
        derived = tuple(dict.fromkeys((*left.derived, *right.derived)))
        if both:
            if left.adds_keys and right.adds_keys:
                self.fail(node, "only one operand of `&` may add keys")
            extra = left if left.adds_keys else right
            return Seen(left.keep & right.keep, extra.phantoms, extra.times, derived)
        for side, seen in ((node.left, left), (node.right, right)):
            self._without_extra_keys(side, seen)
        return Seen(left.keep | right.keep, derived=derived)

    def _without_extra_keys(self, node: ast.expr, seen: Seen) -> Seen:
        if seen.adds_keys:
            self.fail(node, "a mask that adds keys may only be the whole mask or an operand of `&`")
        return seen

    # Words

    def word(self, node: ast.expr, folder: str) -> object:
        """What a word of a folder gives for the arguments written behind it."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return parse_call(node.value, folder, self.words, self.scope)
        named = node.func if isinstance(node, ast.Call) else node
        name = dotted(named)
        if name is None:
            self.fail(node, f"expected a word of {folder}: {', '.join(sorted(self.words.get(folder, {})))}")
        known = self.words.get(folder, {})
        if name not in known:
            self.fail(named, f'there is no word "{name}" in {folder}{did_you_mean(name, known)}')
        positional, keywords = self._arguments(node, known[name]) if isinstance(node, ast.Call) else ([], {})
        return self._call(node, known[name], positional, keywords)

    def _arguments(self, node: ast.Call, word: Word) -> tuple[list[ast.expr], dict[str, ast.expr]]:
        for argument in node.args:
            if isinstance(argument, ast.Starred):
                self.fail(argument, "`*` is not part of the language")
        keywords: dict[str, ast.expr] = {}
        allowed = [p.name for p in word.parameters if p.kind is not p.KEYWORD_ONLY]
        for keyword in node.keywords:
            if keyword.arg is None or keyword.arg not in allowed:
                message = f'`{word.name}` takes no argument "{keyword.arg}"{did_you_mean(str(keyword.arg), allowed)}'
                self.fail(keyword.value, message)
            keywords[keyword.arg] = keyword.value
        return node.args, keywords

    def _call(self, node: ast.expr, word: Word, positional: list[ast.expr], keywords: dict[str, ast.expr]) -> object:
        given = dict[str, object]()
        for parameter in word.parameters:
            if parameter.kind is parameter.KEYWORD_ONLY:
                given[parameter.name] = self._supplied(node, word, parameter)
        signature = inspect.signature(word.function)
        authored = signature.replace(parameters=[p for p in word.parameters if p.kind is not p.KEYWORD_ONLY])
        try:
            bound = authored.bind(*positional, **keywords)
        except TypeError as error:
            self.fail(node, f"`{word.name}{_written(authored)}`: {error}")
        values = list[object]()
        for name, value in bound.arguments.items():
            if authored.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
                values.extend(read_argument(self, x, word.hints[name]) for x in value)
            else:
                given[name] = read_argument(self, value, word.hints[name])
        try:
            return word.function(*values, **given)
        except (LanguageError, AlgebraError) as error:
            self.fail(node, str(error))

    def _supplied(self, node: ast.expr, word: Word, parameter: inspect.Parameter) -> object:
        supplied = getattr(self.scope, parameter.name)
        if supplied is None and parameter.default is parameter.empty:
            self.fail(node, f"`{word.name}` speaks of a {parameter.name}; set the slot `{parameter.name}`")
        return supplied

    # Expressions

    def scalar(self, node: ast.expr) -> Expr:
        try:
            return self._scalar(node)
        except AlgebraError as error:
            self.fail(node, str(error))

    def _scalar(self, node: ast.expr) -> Expr:
        match node:
            case ast.Constant(value) if isinstance(value, str):
                return _Reader(_one_line(value), self.words, self.scope).whole()
            case ast.Constant(value) if isinstance(value, int | float):
                return e.const(value)
            case ast.BinOp(left, op, right) if type(op) in ARITHMETIC:
                return e.apply(ARITHMETIC[type(op)], self.scalar(left), self.scalar(right))
            case ast.UnaryOp(op, operand):
                return self._signed(node, op, operand)
            case ast.Compare(left, [op], [right]) if type(op) in COMPARISONS:
                return COMPARISONS[type(op)](self.scalar(left), self.scalar(right))
            case ast.Compare(_, [_, _, *_], _):
                self.fail(node, "comparisons cannot be chained: write (a < b) & (b < c)")
            case ast.BoolOp():
                self.fail(node, "write `&` and `|` instead of `and` and `or`")
            case ast.Call(func) if (name := dotted(func)) in FUNCTIONS:
                return self._function(node, str(name))
            case ast.Subscript(value, at):
                return self._table(value, at.elts if isinstance(at, ast.Tuple) else [at])
            case ast.Name() | ast.Attribute():
                return self._named(node)
            case ast.Call():
                return self._term(node)
        return self.fail(node, "expected a number or an expression")

    def whole(self) -> Expr:
        return self.scalar(self.tree())

    def _signed(self, node: ast.expr, op: ast.unaryop, operand: ast.expr) -> Expr:
        inner = self.scalar(operand)
        if isinstance(op, ast.USub):
            return e.const(-inner.value) if isinstance(inner.value, int | float) and inner.is_const else -inner
        if isinstance(op, ast.Invert):
            return ~inner
        return inner if isinstance(op, ast.UAdd) else self.fail(node, "write `~` instead of `not`")

    def _function(self, node: ast.Call, name: str) -> Expr:
        arity, function = FUNCTIONS[name]
        if len(node.args) != arity or node.keywords:
            self.fail(node, f"`{name}` takes {arity} {'argument' if arity == 1 else 'arguments'}")
        operands: list[Operand] = [self.scalar(x) for x in node.args]
        return function(*operands)

    def _named(self, node: ast.expr) -> Expr:
        name = dotted(node)
        if name is None:
            self.fail(node, "expected a name")
        if name in LEAVES:
            return LEAVES[name]
        if name in self.scope.values:
            return e.const(self.scope.values[name])
        if name in self.words.get("scores", {}):
            return self._term(node)
        return self._read(node, name, (e.layer, e.h))

    def _table(self, node: ast.expr, at: list[ast.expr]) -> Expr:
        name = dotted(node)
        if name is None:
            self.fail(node, "only a table can be read at coordinates")
        places = tuple(self.scalar(x) for x in at)
        return self._read(node, name, (e.layer, e.h) if places == (e.h,) else places)

    def _read(self, node: ast.expr, name: str, at: tuple[Expr, ...]) -> Expr:
        table = self.scope.table_name(name)
        if not self.scope.knows_table(table):
            known = {*LEAVES, *FUNCTIONS, *self.words.get("scores", {}), *self.scope.names()}
            self.fail(node, f'there is no "{name}"{did_you_mean(name, known)}')
        return e.table(table, *at, sort=Sort.REAL)

    def _term(self, node: ast.expr) -> Expr:
        found = self.word(node, "scores")
        return found if isinstance(found, Expr) else self.fail(node, "a word for scores must give an expression")


def _written(signature: inspect.Signature) -> str:
    shown = (f"{p.name}={p.default!r}" if p.default is not p.empty else p.name for p in signature.parameters.values())
    return f"({', '.join(shown)})"
