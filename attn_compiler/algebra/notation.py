"""Writes an expression down: as mathematics for people, as canonical text for digests."""

from __future__ import annotations

from functools import lru_cache

from attn_compiler.algebra.expr import Expr

# Operations that stand between their operands: the sign, and how tightly it binds.
_SIGNS = {
    "or": (" ∨ ", 1),
    "and": (" ∧ ", 2),
    "lt": (" < ", 4),
    "le": (" ≤ ", 4),
    "eq": (" = ", 4),
    "add": (" + ", 5),
    "sub": (" − ", 5),
    "mul": ("·", 6),
    "div": (" / ", 6),
    "mod": (" mod ", 6),
    "pow": ("^", 8),
}
_TIGHTEST = 9


def notation(e: Expr) -> str:
    """`e` as mathematics, with as few parentheses as can be."""
    return _write(e)[0]


def _write(e: Expr) -> tuple[str, int]:
    """The text, and how tightly its outermost operation binds."""
    if e.op == "const":
        return _number(e), 5 if str(e.value).startswith("-") else _TIGHTEST
    if e.op == "symbol":
        return str(e.value), _TIGHTEST
    inner = [_write(a) for a in e.args]
    texts = [text for text, _ in inner]
    if e.op == "table":
        return f"{e.value}[{', '.join(texts)}]" if texts else str(e.value), _TIGHTEST
    if e.op in _SIGNS:
        sign, binds = _SIGNS[e.op]
        left = _enclosed(inner[0], binds)
        right = _enclosed(inner[1], binds + (e.op in ("sub", "div", "mod", "pow")))
        return left + sign + right, binds
    match e.op:
        case "not" if e.args[0].op == "eq":
            left, right = (_enclosed(_write(a), 4) for a in e.args[0].args)
            return f"{left} ≠ {right}", 4
        case "not":
            return "¬" + _enclosed(inner[0], 7), 7
        case "neg":
            return "−" + _enclosed(inner[0], 6), 5
        case "abs":
            return f"|{texts[0]}|", _TIGHTEST
        case "floordiv":
            return f"⌊{_enclosed(inner[0], 6)} / {_enclosed(inner[1], 7)}⌋", _TIGHTEST
        case "floor" | "ceil":
            return ("⌊{}⌋" if e.op == "floor" else "⌈{}⌉").format(texts[0]), _TIGHTEST
        case "sqrt":
            return "√" + _enclosed(inner[0], _TIGHTEST), 8
        case "real":
            return inner[0]
        case "where":
            return f"({texts[1]} if {texts[0]} else {texts[2]})", _TIGHTEST
    return f"{e.op}({', '.join(texts)})", _TIGHTEST


def _enclosed(written: tuple[str, int], least: int) -> str:
    text, binds = written
    return text if binds >= least else f"({text})"


def _number(e: Expr) -> str:
    if isinstance(e.value, bool):
        return "everywhere" if e.value else "nowhere"
    return f"{e.value:.6g}".replace("inf", "∞") if isinstance(e.value, float) else str(e.value)


@lru_cache(maxsize=1 << 16)
def text(e: Expr) -> str:
    """`e` as unambiguous text: equal texts are equal expressions."""
    if e.op == "const":
        return repr(e.value)
    if e.op == "symbol":
        return str(e.value)
    inner = ", ".join(text(a) for a in e.args)
    if e.op == "table":
        return f"table({str(e.value)!r}, {e.sort.value!r}{', ' if inner else ''}{inner})"
    return f"{e.op}({inner})"
