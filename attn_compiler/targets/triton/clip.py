"""The kernels that cut what is visited to what tables show: masks that compare what these say of two tokens, or of two blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import lru_cache, reduce
from math import gcd

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.boolean import conjunction
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.linear import linear
from attn_compiler.algebra.simplify import conjuncts, simplify
from attn_compiler.planning.atoms import Alone, Any, Atom, Below, Both, Formula, Opaque, Side, atoms, formula
from attn_compiler.targets.cpp.printer import Level
from attn_compiler.targets.cpp.spec import Spec
from attn_compiler.targets.operands import PLACE
from attn_compiler.targets.triton.printer import Printer
from attn_compiler.targets.triton.source import assembled, printer_of

TILES = 16  # that they look at together
LEAST_ALIKE = 16  # neighbors of which one is asked for all

ALIKE = ("Q_ALIKE", "K_ALIKE")
Alike = tuple[int, int]  # how many neighbors stand in the same block: of the queries, of the keys
Firsts = Mapping[Expr, int]  # the first positions of a call


def divided(mask: Expr, unknown: AbstractSet[str], firsts: Firsts | None = None) -> tuple[Expr, Expr]:
    """What of a mask (in places) is known ahead, and what a kernel finds out from tables: both hold where the mask does."""
    known, shown = list[Expr](), list[Expr]()
    for part in conjuncts(mask):
        found_out = part.tables() & unknown and all(_can_be_found_out(atom, firsts or {}) for atom in atoms(_formula(part)))
        (shown if found_out else known).append(part)
    return conjunction(known, {}), conjunction(shown, {})


def alike(shown: Expr, firsts: Firsts) -> Alike | None:
    """How many neighbors are alike to what is shown by tables of blocks; None where it all compares tokens."""
    found = [_alike(atom, firsts) for atom in atoms(_formula(shown)) if isinstance(atom, Opaque)]
    return (reduce(gcd, (q for q, _ in found)), reduce(gcd, (k for _, k in found))) if found else None


@lru_cache(maxsize=256)
def clipping(spec: Spec, shown: Expr, *, by_key: bool = False) -> str:
    """The kernel for tiles of queries that meet tiles of keys, or with `by_key` for tiles of keys that meet tiles of queries.

    Where tables are of blocks, it lists tiles.
    """
    parts = _formula(shown)
    name = "sift.py" if any(isinstance(atom, Opaque) for atom in atoms(parts)) else "clip.py"
    printer = printer_of(spec, name)
    asked = {atom: printer.name(atom.condition) for atom in dict.fromkeys(atoms(parts)) if isinstance(atom, Opaque)}
    extremes = {level: _extremes(printer, parts, level) for level in (Level.LANE, Level.ROW)}
    tokens = {Level.LANE: "i = tokens({}, q_len, q_order, BLOCK_Q)", Level.ROW: "j = tokens({}, k_len, k_order, BLOCK_K)"}
    own, other = (Level.ROW, Level.LANE) if by_key else (Level.LANE, Level.ROW)
    holes = {
        "own": [tokens[own].format("tile"), *printer.scope(own), *extremes[own]],
        "count": [f"tiles = {'tl.cdiv(q_len, BLOCK_Q)' if by_key else 'tl.cdiv(k_len, BLOCK_K)'}"],
        "others": [tokens[other].format("other"), *printer.scope(other), *extremes[other]],
        "blocks": _sampled(printer, asked, by_key=by_key),
        "truth": [f"{name} = {_truth(printer, parts, asked, n)}" for n, name in enumerate(("somewhere", "everywhere"))],
    }
    return assembled(name, spec, printer, holes, {})


def _formula(mask: Expr) -> Formula:
    return formula(mask.substitute({PLACE: e.k}))


def _can_be_found_out(atom: Atom, firsts: Firsts) -> bool:
    """Whether the extremes of what a tile's tokens are compared by decide it, or some of them stand for all.

    No extreme may be no number.
    """
    match atom:
        case Below(key, query, _):
            return all(_is_a_number(part) for side in (key, query) for part in side.walk())
        case Alone(condition, _):
            return all(_is_a_number(part) for part in condition.walk())
    return min(_alike(atom, firsts)) >= LEAST_ALIKE


def _alike(atom: Opaque, firsts: Firsts) -> Alike:
    condition = atom.condition.substitute({e.k: PLACE}).substitute({first: e.const(n) for first, n in firsts.items()})
    queries, keys = (_neighbors(condition, token) for token in (e.i, PLACE))
    return queries & -queries, keys & -keys  # tiles are powers of two


def _neighbors(part: Expr, token: Expr) -> int:
    """How many tokens that follow each other, from the first on, a part takes for the same; 0 for all."""
    if part.op == "floordiv" and part.args[1].is_const:
        place, size = linear(part.args[0]), part.args[1].value
        if place.factors == {token: 1} and isinstance(size, int):
            return gcd(size, place.constant)
    return int(part == token) if not part.args else reduce(gcd, (_neighbors(x, token) for x in part.args))


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


def _sides(atom: Atom) -> dict[Level, Expr]:
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
    return [_bounded(part, printer.held(part, "exact"), alone=printer.level(part) is Level.TASK) for part in found]


def _bounded(part: Expr, name: str, *, alone: bool) -> str:
    """The statement that finds the extremes of a part, which is `alone` where it is the same for all tokens."""
    number = f"tl.cast({name}, tl.int32)" if part.sort is Sort.BOOL else name
    return f"{name}_least, {name}_most = {f'{number}, {number}' if alone else f'extremes({number})'}"


def _sampled(printer: Printer, asked: Mapping[Opaque, str], *, by_key: bool) -> Sequence[str]:
    """The statements that ask what holds somewhere and what everywhere of the blocks that two tiles meet."""
    names = {Level.LANE: ("query", "q_len", "BLOCK_Q", "Q_ALIKE"), Level.ROW: ("key", "k_len", "BLOCK_K", "K_ALIKE")}
    own, other = (names[level] for level in ((Level.ROW, Level.LANE) if by_key else (Level.LANE, Level.ROW)))
    inner = printer.elsewhere({e.i: ("query", Level.PAIR), PLACE: ("key", Level.PAIR)})
    starts, steps = list[str](), [f"{own[0]} = tl.minimum(tile * {own[2]} + n, {own[1]} - 1)"]
    for atom, name in asked.items():
        starts += [f"{name}_least, {name}_most = 1, 0"]
        steps += inner.assign(name, atom.condition.substitute({e.k: PLACE}), "exact")
        steps += [f"low, high = extremes(tl.cast({name}, tl.int32))"]
        steps += [f"{name}_least, {name}_most = tl.minimum({name}_least, low), tl.maximum({name}_most, high)"]
    loop = f"for n in tl.static_range(0, {own[2]}, {own[3]}):"
    if not asked:
        return []
    return [f"{other[0]} = apart(other, {', '.join(other[1:])})", *starts, loop, *(f"    {line}" for line in steps)]


def _truth(printer: Printer, part: Formula, asked: Mapping[Opaque, str], everywhere: int) -> str:
    """Whether a formula holds for some pair of two tiles, or everywhere for all."""
    match part:
        case Both(parts) | Any(parts):
            joint = " & " if isinstance(part, Both) else " | "
            return f"({joint.join(_truth(printer, one, asked, everywhere) for one in parts)})"
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
        case Opaque():
            return f"({asked[part]}_{'least' if everywhere else 'most'} != 0)"
