"""The backward kernels of a spec: its expressions and their derivatives, seen from the queries and from the keys."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import count

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort, const
from attn_compiler.algebra.variant import EmptyRows
from attn_compiler.targets.cpp.gradient import ALONG, OF_SCORE, OF_TOTAL, OF_WEIGHT, Slopes
from attn_compiler.targets.cpp.printer import Leaves, Level
from attn_compiler.targets.cpp.spec import Spec
from attn_compiler.targets.triton.distance import by_distance
from attn_compiler.targets.triton.printer import INSIDE, LEAVES, Printer
from attn_compiler.targets.triton.source import Holes, Iteration, assembled, constants, pair, phases, printer_of, walk

_ZERO = const(0.0)
_BY_QUERY: Leaves = {
    **LEAVES,
    OF_WEIGHT: ("of_weight", Level.PAIR),
    OF_SCORE: ("of_score", Level.PAIR),
    ALONG: ("along", Level.LANE),
    OF_TOTAL: ("of_total", Level.LANE),
}
_BY_KEY: Leaves = {
    **_BY_QUERY,
    INSIDE: ("(column < q_len)", Level.LANE),
    e.q_norm: ("norm(queries).T", Level.LANE),
    e.k_norm: ("norm(keys)", Level.ROW),
}
_TOTAL = e.symbol("total", Sort.REAL)  # of a diagonal
_BY_DISTANCE: Leaves = {**_BY_QUERY, INSIDE: ("(row < q_len) & (column < k_len)", Level.PAIR), _TOTAL: ("total", Level.PAIR)}
TILES = 32  # that a program owns at most of those that are equally far apart


@lru_cache(maxsize=256)
def by_query(spec: Spec, iteration: Iteration, wanted: tuple[str, ...]) -> str:
    """The kernel that finds the gradients of q and of the tables in the factor that want one."""
    printer, slopes = printer_of(spec, "backward_q.py", _BY_QUERY), Slopes(spec)
    assert spec.factor is not None
    every = ("seen = highest != -INFINITY", "steps = tl.where(tl.min(tl.cast(seen, tl.int32)) == 0, tl.cdiv(k_len, BLOCK_K), 0)")
    fills = spec.variant.empty_rows is EmptyRows.UNMASKED
    holes = {
        **pair(printer, spec, INSIDE, ("visible = (column < k_len) & ~seen",) if fills else ()),
        **walk(iteration.stretches, every if fills else ()),
        **_slopes(printer, slopes, e.q_norm),
        "numbers": [*printer.assign("factor", spec.factor), *printer.assign("pull", slopes.of_query(e.mass))],
        "query sums": _sums(printer, {x: slopes.of_query(x) for x in slopes.reads(*wanted)}),
    }
    facts = {"FILLS": fills, "NORMED": slopes.score(e.q_norm) != _ZERO, "ORDERED": iteration.ordered}
    return assembled("backward_q.py", spec, printer, holes, facts, phases(iteration, holes), _named(printer, wanted))


@lru_cache(maxsize=256)
def by_key(spec: Spec, iteration: Iteration, wanted: tuple[str, ...]) -> str:
    """The kernel that finds the gradients of k, v and of tables, from what the other one found for each query."""
    printer, slopes = printer_of(spec, "backward_kv.py", _BY_KEY), Slopes(spec)
    left = {} if iteration.ordered else read_by_distance(spec, wanted)
    printer.axes = (Level.ROW, Level.LANE)
    fills = spec.variant.empty_rows is EmptyRows.UNMASKED
    every = ("steps = tl.where(tl.load(unseeing + b * heads + h) != 0, tl.cdiv(q_len, BLOCK_Q), 0)",)
    blind = ("visible = (tl.load(numbers + 3 * count + query) != 0.0) & (column < q_len)",)
    holes = {
        **pair(printer, spec, INSIDE, blind if fills else ()),
        **walk(iteration.stretches, every if fills else ()),
        **_slopes(printer, slopes, e.k_norm),
        "pair sums": _sums(printer, {x: slopes.of_pair(x) for x in slopes.reads(*wanted) if x not in left}),
    }
    facts = {"NORMED": slopes.score(e.k_norm) != _ZERO, "ORDERED": iteration.ordered}
    return assembled("backward_kv.py", spec, printer, holes, facts, phases(iteration, holes), _named(printer, wanted))


def read_by_distance(spec: Spec, wanted: tuple[str, ...]) -> Mapping[Expr, Expr]:
    """Where tables that want gradients are read by nothing of two tokens but their distance, and how by that."""
    slopes = Slopes(spec)
    found = ((x, by_distance(x)) for x in slopes.reads(*wanted) if slopes.of_pair(x) != _ZERO)
    return {read: along for read, along in found if along is not None}


@lru_cache(maxsize=256)
def along_diagonals(spec: Spec, wanted: tuple[str, ...]) -> str:
    """The kernel that finds the gradients of tables that are read by distance, where tokens are visited as they come."""
    printer, slopes = printer_of(spec, "diagonals.py", _BY_DISTANCE), Slopes(spec)
    normed = any(x is not None and x.mentions(e.q_norm, e.k_norm) for x in spec.parts())
    starts, sums, ends = list[str](), list[str](), list[str]()
    for read, along in read_by_distance(spec, wanted).items():
        name = printer.untaken(f"sum{n}" for n in count())
        starts += [f"{name} = tl.zeros([BLOCK, BLOCK], tl.float32)"]
        sums += [*printer.assign("share", slopes.of_pair(read)), f"{name} += tl.where(visible, share, 0.0)"]
        ends += [f"ahead, total = diagonals({name}, BLOCK)", "distance = lead * BLOCK + first_query - first_key + ahead"]
        ends += printer.addition(along, _TOTAL)
    of_pairs, also = pair(printer, spec, INSIDE), list[str]()
    if spec.variant.empty_rows is EmptyRows.UNMASKED:
        also = ["visible |= (row < q_len) & (column < k_len) & (tl.load(numbers + 3 * count + query) != 0.0)"]
    holes = {
        **of_pairs,
        **_slopes(printer, slopes, e.q_norm),
        "visible": [*of_pairs["visible"], *also],
        "start": starts,
        "pair sums": sums,
        "sums": ends,
    }
    tiles, of_tables = f"TILES = {constants(TILES)}", _named(printer, wanted)
    return assembled("diagonals.py", spec, printer, holes, {"NORMED": normed}, tiles, of_tables)


def _slopes(printer: Printer, slopes: Slopes, norm: Expr) -> Holes:
    """From the gradient of a weight to those of the score, the dot product and a norm; what is hidden has none."""
    if slopes.spec.by_peak:
        weights = ["weight = tl.exp2(score - base)", "of_score = of_weight * weight"]
    else:
        hidden = "score == -INFINITY"
        weights = [
            *printer.assign("weight", slopes.spec.variant.normalizer.weight),
            *printer.assign("slope", slopes.weight),
            f"weight = tl.where({hidden}, 0.0, weight)",
            f"of_weight = tl.where({hidden}, 0.0, of_weight)",
            f"of_score = tl.where({hidden}, 0.0, of_weight * slope)",
        ]
    of_norm = printer.assign("along_norm", OF_SCORE * slopes.score(norm))
    return {
        "score gradient": weights,
        "dot gradient": printer.assign("of_dot", OF_SCORE * slopes.score(e.dot)),
        "norm gradient": [*of_norm, "of_norm += tl.sum(along_norm, 1, keep_dims=True)"],
    }


def _sums(printer: Printer, added: dict[Expr, Expr]) -> list[str]:
    return [line for read, value in added.items() if value != _ZERO for line in printer.addition(read, value, "inside")]


def _named(printer: Printer, wanted: tuple[str, ...]) -> list[str]:
    return [printer.tables[name][0] for name in wanted]
