"""The backward kernels of a spec: its expressions and their derivatives, seen from the queries and from the keys."""

from __future__ import annotations

from functools import lru_cache

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, const
from attn_compiler.algebra.variant import EmptyRows
from attn_compiler.targets.cpp.gradient import ALONG, OF_SCORE, OF_TOTAL, OF_WEIGHT, Slopes
from attn_compiler.targets.cpp.printer import Leaves, Level
from attn_compiler.targets.cpp.spec import Spec
from attn_compiler.targets.triton.printer import INSIDE, LEAVES, Printer
from attn_compiler.targets.triton.source import Holes, Iteration, assembled, pair, phases, printer_of, walk

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
    """The kernel that finds the gradients of k, v and of all other tables, from what the other one found for each query."""
    printer, slopes = printer_of(spec, "backward_kv.py", _BY_KEY), Slopes(spec)
    printer.axes = (Level.ROW, Level.LANE)
    fills = spec.variant.empty_rows is EmptyRows.UNMASKED
    every = ("steps = tl.where(tl.load(unseeing + b * heads + h) != 0, tl.cdiv(q_len, BLOCK_Q), 0)",)
    left = ("visible = (tl.load(numbers + 3 * count + query) != 0.0) & (column < q_len)",)
    holes = {
        **pair(printer, spec, INSIDE, left if fills else ()),
        **walk(iteration.stretches, every if fills else ()),
        **_slopes(printer, slopes, e.k_norm),
        "pair sums": _sums(printer, {x: slopes.of_pair(x) for x in slopes.reads(*wanted)}),
    }
    facts = {"NORMED": slopes.score(e.k_norm) != _ZERO, "ORDERED": iteration.ordered}
    return assembled("backward_kv.py", spec, printer, holes, facts, phases(iteration, holes), _named(printer, wanted))


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
    return [line for read, value in added.items() if value != _ZERO for line in printer.addition(read, value)]


def _named(printer: Printer, wanted: tuple[str, ...]) -> list[str]:
    return [printer.tables[name][0] for name in wanted]
