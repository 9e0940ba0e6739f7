"""Writes an expression down: as mathematics for people, as canonical text for digests."""

from __future__ import annotations

from functools import lru_cache

from attn_compiler.algebra.expr import Expr, i, k, q

# Operations that stand between their operands: the sign, and how tightly it binds.
_SIGNS = {
    "or": (" ∨ ", 1),
    "and": (" ∧ ", 2),
    "lt": (" < ", 4),
    "le": (" ≤ ", 4),
    "eq": (" = ", 4),
    "add": (" + ", 5),
    "sub": (" − ", 5),
    "mod": (" mod ", 6),
    "mul": ("·", 7),
    "div": (" / ", 7),
    "pow": ("^", 9),
}
_TIGHTEST = 10


def notation(e: Expr) -> str:
    """`e` as mathematics, with as few parentheses as can be."""
    return _write(e)[0]


def _write(e: Expr) -> tuple[str, int]:
    """The text, and how tightly its outermost operation binds."""
    if e.op == "const":
        return _number(e), 5 if str(e.value).startswith("-") else _TIGHTEST
    if e.op == "symbol":
        return str(e.value), _TIGHTEST
    distance = _distance(e)
    if distance is not None:
        return distance
    inner = [_write(a) for a in e.args]
    texts = [text for text, _ in inner]
    if e.op == "table":
        return f"{e.value}[{', '.join(texts)}]" if texts else str(e.value), _TIGHTEST
    if e.op in _SIGNS:
        sign, binds = _SIGNS[e.op]
        left = _enclosed(inner[0], 8 if e.op == "mod" else binds)  # people disagree on what `a·b mod c` is
        right = _enclosed(inner[1], 8 if e.op == "mod" else binds + (e.op in ("sub", "div", "pow")))
        return left + sign + right, binds
    match e.op:
        case "not" if e.args[0].op == "eq":
            left, right = (_enclosed(_write(a), 4) for a in e.args[0].args)
            return f"{left} ≠ {right}", 4
        case "not":
            return "¬" + _enclosed(inner[0], 8), 8
        case "neg":
            return "−" + _enclosed(inner[0], 7), 5
        case "abs":
            return f"|{texts[0]}|", _TIGHTEST
        case "floordiv":
            return f"⌊{_enclosed(inner[0], 7)} / {_enclosed(inner[1], 8)}⌋", _TIGHTEST
        case "floor" | "ceil":
            return ("⌊{}⌋" if e.op == "floor" else "⌈{}⌉").format(texts[0]), _TIGHTEST
        case "sqrt":
            return "√" + _enclosed(inner[0], _TIGHTEST), 9
        case "real":
            return inner[0]
        case "where":
            return f"{_enclosed(inner[1], 1)} if {_enclosed(inner[0], 1)} else {_enclosed(inner[2], 1)}", 0
    return f"{e.op}({', '.join(texts)})", _TIGHTEST


def _distance(e: Expr) -> tuple[str, int] | None:
    """`q ≤ k + 255` as people say it: `q − k < 256`; with its mirror image, `|q − k| < 256`."""
    if e.op == "and" and len(e.args) == 2:
        one, other = (_reach(a) for a in e.args)
        if one and other and one == (other[1], other[0], other[2]):
            key, query = sorted(str(place.value) for place in one[:2])
            return (f"|{query} − {key}|" if key == "k" else f"|{key} − {query}|") + f" < {one[2]}", 4
    reach = _reach(e)
    return reach and (f"{reach[0].value} − {reach[1].value} < {reach[2]}", 4)


def _reach(e: Expr) -> tuple[Expr, Expr, int] | None:
    """The (a, b, n) of a condition `a − b < n` between a query and a key, with n > 1; None for all else."""
    if e.op != "le" or e.args[1].op != "add":
        return None
    (nearer, bound), places = e.args, {q, i, k}
    shift = next((a.value for a in bound.args if a.is_const), None)
    rest = [a for a in bound.args if not a.is_const]
    if not isinstance(shift, int) or shift < 1 or len(rest) != 1 or not {nearer, rest[0]} <= places:
        return None
    return nearer, rest[0], shift + 1


def _enclosed(written: tuple[str, int], least: int) -> str:
    text, binds = written
    return text if binds >= least else f"({text})"


def _number(e: Expr) -> str:
    if isinstance(e.value, bool):
        return "everywhere" if e.value else "nowhere"
    written = f"{e.value:.6g}".replace("inf", "∞") if isinstance(e.value, float) else str(e.value)
    return written.replace("-", "−")


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
