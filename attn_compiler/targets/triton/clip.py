"""The kernel that cuts what is visited to what tables show, for masks that compare what tables say of one token with another."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from functools import lru_cache

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.boolean import conjunction
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.simplify import conjuncts, simplify
from attn_compiler.planning.atoms import Alone, Any, Below, Both, Formula, Opaque, Side, atoms, formula
from attn_compiler.targets.cpp.printer import Level
from attn_compiler.targets.cpp.spec import Spec
from attn_compiler.targets.operands import PLACE
from attn_compiler.targets.triton.printer import Printer
from attn_compiler.targets.triton.source import assembled, printer_of

TILES = 32  # that it looks at together


def divided(mask: Expr, unknown: AbstractSet[str]) -> tuple[Expr, Expr]:
    """What of a mask (in places) is known ahead, and what a kernel finds out from tables: both hold where the mask does."""
    known, shown = list[Expr](), list[Expr]()
    for part in conjuncts(mask):
        found_out = part.tables() & unknown and all(map(_can_be_bounded, atoms(_formula(part))))
        (shown if found_out else known).append(part)
    return conjunction(known, {}), conjunction(shown, {})


@lru_cache(maxsize=256)
def clipping(spec: Spec, shown: Expr, *, by_key: bool = False) -> str:
    """The kernel for tiles of queries that meet tiles of keys, or with `by_key` for tiles of keys that meet tiles of queries."""
    printer, parts = printer_of(spec, "clip.py"), _formula(shown)
    extremes = {level: _extremes(printer, parts, level) for level in (Level.LANE, Level.ROW)}
    tokens = {Level.LANE: "i = tokens({}, q_len, q_order, BLOCK_Q)", Level.ROW: "j = tokens({}, k_len, k_order, BLOCK_K)"}
    own, other = (Level.ROW, Level.LANE) if by_key else (Level.LANE, Level.ROW)
    holes = {
        "own": [tokens[own].format("tile"), *printer.scope(own), *extremes[own]],
        "count": [f"tiles = {'tl.cdiv(q_len, BLOCK_Q)' if by_key else 'tl.cdiv(k_len, BLOCK_K)'}"],
        "others": [tokens[other].format("other"), *printer.scope(other), *extremes[other]],
        "truth": [f"somewhere = {_truth(printer, parts, 0)}", f"everywhere = {_truth(printer, parts, 1)}"],
    }
    return assembled("clip.py", spec, printer, holes, {})


def _formula(mask: Expr) -> Formula:
    return formula(mask.substitute({PLACE: e.k}))


def _can_be_bounded(atom: Below | Alone | Opaque) -> bool:
    """Whether the extremes of what a tile's tokens are compared by decide it: none of these may be no number."""
    match atom:
        case Below(key, query, _):
            return all(_is_a_number(part) for side in (key, query) for part in side.walk())
        case Alone(condition, _):
            return all(_is_a_number(part) for part in condition.walk())
    return False


def _is_a_number(part: Expr) -> bool:
    """Whether a part is one for every token, or else for none, as what a table says of a whole head."""
    if part.sort is not Sort.REAL or part.op in ("const", "real", "add", "sub", "neg"):
        return True
    return part.op == "table" and not part.mentions(e.i, e.k)


def _compared(atom: Below) -> tuple[Expr, Expr, bool]:
    """The two sides, and whether the key's is to be the larger one: -key <= -query."""
    key, query = simplify(atom.key), simplify(atom.query)
    larger = key.op == query.op == "neg"
    return (key.args[0], query.args[0], True) if larger else (key, query, False)


def _sides(atom: Below | Alone | Opaque) -> dict[Level, Expr]:
    """What an atom compares, by the token that it speaks of."""
    match atom:
        case Below():
            key, query, _ = _compared(atom)
            found = {Level.ROW: key, Level.LANE: query}
        case Alone(condition, Side.KEY):
            found = {Level.ROW: condition}
        case Alone(condition, Side.QUERY):
            found = {Level.LANE: condition}
        case _:
            found = {}
    return {level: part.substitute({e.k: PLACE}) for level, part in found.items()}


def _extremes(printer: Printer, parts: Formula, level: Level) -> Sequence[str]:
    """The statements that find the extremes of all that speaks of one of the two tokens."""
    found = dict.fromkeys(part for atom in atoms(parts) for of, part in _sides(atom).items() if of is level)
    names = {part: printer.held(part, "exact") for part in found}
    return [
        f"{name}_least, {name}_most = extremes({f'tl.cast({name}, tl.int32)' if part.sort is Sort.BOOL else name})"
        for part, name in names.items()
    ]


def _truth(printer: Printer, part: Formula, everywhere: int) -> str:
    """Whether a formula holds for some pair of two tiles, or everywhere for all."""
    match part:
        case Both(parts) | Any(parts):
            joint = " & " if isinstance(part, Both) else " | "
            return f"({joint.join(_truth(printer, one, everywhere) for one in parts)})"
        case Below(_, _, strict):
            names = {level: printer.held(side, "exact") for level, side in _sides(part).items()}
            small, large = (Level.LANE, Level.ROW) if _compared(part)[2] else (Level.ROW, Level.LANE)
            ends = ("most", "least") if everywhere else ("least", "most")
            return f"({names[small]}_{ends[0]} {'<' if strict else '<='} {names[large]}_{ends[1]})"
        case Alone(_, Side.NEITHER):
            return printer.held(part.condition.substitute({e.k: PLACE}), "exact")
        case Alone():
            [condition] = _sides(part).values()
            return f"({printer.held(condition, 'exact')}_{'least' if everywhere else 'most'} != 0)"
    raise AssertionError(part)
