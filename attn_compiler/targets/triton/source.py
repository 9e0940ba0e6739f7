"""Fills the holes of a skeleton: a spec becomes a Triton file that reads as if written by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from keyword import iskeyword

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort, const
from attn_compiler.algebra.storage import PLAIN
from attn_compiler.algebra.variant import EmptyRows
from attn_compiler.targets.cpp.printer import Leaves, Level
from attn_compiler.targets.cpp.spec import SEED, Spec, dropped
from attn_compiler.targets.triton import coded
from attn_compiler.targets.triton.precision import multiplied_as
from attn_compiler.targets.triton.printer import INSIDE, LEAVES, LOG2E, Printer
from attn_compiler.targets.triton.skeleton import dialect, skeleton, tools, written

Holes = Mapping[str, Sequence[str]]

_GIVEN = ("begin", "slope", "along_norm", *(f"{end}_{n}" for end in ("start", "stop") for n in range(8)))  # by statements, too
NARROWEST = 16  # numbers that tensor cores multiply at least
# A score of NaN may leave no largest one: the mass tells of it.
_SEEN = ("peak, seen = tl.where(mass == mass, peak, mass), (peak != -INFINITY) | (mass != mass)",)
_FILLING = {
    EmptyRows.ZERO: "0.0",
    EmptyRows.MEAN: "acc / tl.maximum(k_len, 1)",
    EmptyRows.NAN: 'float("nan")',
    EmptyRows.UNMASKED: 'tl.where(k_len == 0, 0.0, float("nan"))',
}


@dataclass(frozen=True)
class Iteration:
    """How a kernel goes over the tiles of keys that a tile of queries meets."""

    stretches: int  # of neighboring tiles, of the mixed ones and as many of the full ones; 0: the tiles stand in a list
    ordered: bool = False  # whether tokens are visited in an order of their own
    specialized: bool = False  # whether some warps do nothing but copy tiles, all of which are met in one loop


@lru_cache(maxsize=256)
def source(spec: Spec, iteration: Iteration) -> str:
    """The forward kernel of a spec."""
    return _in_one_loop(spec, iteration) if iteration.specialized else _in_phases(spec, iteration)


def can_specialize(spec: Spec, iteration: Iteration) -> bool:
    """Whether all that is met can be met in one loop without branches, whose tiles are rows that follow each other."""
    in_one_phase = spec.variant.empty_rows not in (EmptyRows.MEAN, EmptyRows.UNMASKED)
    plain = not spec.variant.dropout and spec.variant.storage == PLAIN
    return in_one_phase and plain and iteration.stretches > 0 and not iteration.ordered


def _in_phases(spec: Spec, iteration: Iteration) -> str:
    printer = printer_of(spec, "forward.py")
    mean = spec.variant.empty_rows is EmptyRows.MEAN
    fills = mean or spec.variant.empty_rows is EmptyRows.UNMASKED
    every = (*_SEEN, "steps = tl.where(tl.min(tl.cast(seen, tl.int32)) == 0, tl.cdiv(k_len, BLOCK_K), 0)")
    left = ("visible = (column < k_len) & ~seen", *(["score = tl.zeros_like(dot)"] if mean else []))
    holes = {
        **pair(printer, spec, INSIDE, left if fills else ()),
        **walk(iteration.stretches, every if fills else ()),
        **coded.products(spec),
        "result": [*([] if mean else _SEEN), *_brought_back(printer, spec), *result(printer, spec)],
    }
    facts = {"MEAN": mean, "ORDERED": iteration.ordered}
    return assembled("forward.py", spec, printer, holes, facts, phases(iteration, holes))


def _in_one_loop(spec: Spec, iteration: Iteration) -> str:
    printer = printer_of(spec, "forward_specialized.py")
    holes = {
        **pair(printer, spec, INSIDE),
        **walk(2 * iteration.stretches),
        "result": [*_SEEN, *result(printer, spec)],
    }
    return assembled("forward_specialized.py", spec, printer, holes, {}, f"STRETCHES = {constants(iteration.stretches)}")


def _brought_back(printer: Printer, spec: Spec) -> Sequence[str]:
    v_scale = printer.tables.get(coded.V_SCALE)
    return coded.brought_back(spec, v_scale[0]) if v_scale else ()


def result(printer: Printer, spec: Spec) -> list[str]:
    """What becomes of the sums of a query, and what one gets that saw no key: its log-sum-exp is that of its sink, if any."""
    assert spec.factor is not None
    total = const(0.0) if spec.total is None else spec.total
    lines = printer.assign("factor", spec.factor) + printer.assign("total", total)
    return [
        "peak, mass = tl.where(seen, peak, 0.0), tl.where(seen, mass, 0.0)",
        *lines,
        f"filling = {_FILLING[spec.variant.empty_rows]}",
    ]


def printer_of(spec: Spec, name: str, leaves: Leaves = LEAVES) -> Printer:
    """A printer that knows the tables of a spec, and which names a skeleton has taken."""
    taken = {*re.findall(r"\w+", skeleton(name)), *tools(), *coded.NAMES, *_GIVEN}
    tables = {table: (_identifier(table, taken), stored) for table, stored in spec.tables}
    if spec.by_peak:
        leaves = {**leaves, e.peak: ("(peak * LN2)", Level.LANE)}
    names = dict.fromkeys((spec.variant.scale, in_base_two(spec.variant.scale)), "scale")
    return Printer(dialect(), tables, names, taken, leaves)


def pair(printer: Printer, spec: Spec, inside: Expr, left: Sequence[str] = ()) -> Holes:
    """What is known of a pair of tokens, of which one may stand beyond the last; scores by the peak are in base two.

    `left` are the statements of the third phase that say which pairs queries meet that saw no key.
    """
    mask = spec.variant.mask
    visible = printer.assign("visible", inside if mask == e.true else inside & mask, real="exact")
    weight = [] if spec.by_peak else printer.assign("weight", spec.variant.normalizer.weight)
    if left and spec.variant.empty_rows is EmptyRows.MEAN:
        weight += ["weight = weight if phase < 2 else 1.0"]
    return {
        "visible": either("phase == 0", visible, left) if left else visible,
        "score": printer.assign("score", in_base_two(spec.score) if spec.by_peak else spec.score),
        "weight": weight,
    }


def either(fact: str, yes: Sequence[str], no: Sequence[str]) -> list[str]:
    """Statements where a fact holds, and others where it does not."""
    return [f"if {fact}:", *(f"    {line}" for line in yes), "else:", *(f"    {line}" for line in no)]


def assembled(
    name: str,
    spec: Spec,
    printer: Printer,
    holes: Holes,
    facts: Mapping[str, bool],
    constant: str = "",
    sums: Sequence[str] = (),
) -> str:
    """A skeleton with its holes filled; `constant` is a line that only it has, `sums` are the tables that want gradients."""
    tables = [called for called, _ in printer.tables.values()]
    scopes = {"per pair": Level.PAIR, "per key": Level.ROW, "per query": Level.LANE, "per head": Level.TASK}
    every = {
        "constants": [*_constants(spec), *filter(None, [constant])],
        "tables": [*_unpacked(tables, "tables"), *_unpacked([f"of_{called}" for called in sums], "sums")],
        **holes,
        **{hole: printer.scope(level) for hole, level in scopes.items()},
        "drawn": [f"drawn = draw({printer.tables[SEED][0]}, b * heads + h)"] if SEED in printer.tables else [],
    }
    asked = {"BY_PEAK": spec.by_peak, "DROPS": spec.variant.dropout > 0, **facts}
    return multiplied_as(written(name, every, asked), spec.dtype)


def _unpacked(names: Sequence[str], values: str) -> list[str]:
    return [f"({', '.join(names)},) = {values}"] if names else []


def in_base_two(score: Expr) -> Expr:
    """`score` times log2(e), multiplied into what does not depend on the pair where that is possible."""
    if score.sort is not Sort.REAL:
        return score * LOG2E
    match score.op:
        case "add" | "sub":
            return e.apply(score.op, *map(in_base_two, score.args))
        case "neg":
            return -in_base_two(score.args[0])
        case "mul":
            a, b = score.args
            return a * in_base_two(b) if a.mentions(e.dot) else in_base_two(a) * b
        case "div" if score.args[0].mentions(e.dot):
            return in_base_two(score.args[0]) / score.args[1]
        case "const":
            return const(float(score.value) * LOG2E)  # type: ignore[arg-type]  # a number, since it is real
    return score * LOG2E


def phases(iteration: Iteration, holes: Holes) -> str:
    """How often a kernel goes over tiles, and how many stretches these stand in."""
    count = 2 + any("phase == 2" in line for line in holes["steps"])
    return f"PHASES, STRETCHES = {constants(count, max(1, iteration.stretches))}"


def _constants(spec: Spec) -> Iterator[str]:
    dims = (spec.dim, spec.value_dim)
    least = 2 * NARROWEST if spec.variant.storage.qk else NARROWEST, NARROWEST  # of bytes twice as many
    widths = (max(few, 1 << (dim - 1).bit_length()) for few, dim in zip(least, dims, strict=True))
    infinity = 'float("inf")'
    yield f"DIM, VALUE_DIM = {constants(*dims)}  # numbers of a query or a key, and of a value"
    yield f"WIDTH, VALUE_WIDTH = {constants(*widths)}  # the same, up to a power of two"
    yield f"INFINITY, LN2, LOG2E = {constants(infinity, math.log(2), LOG2E)}"
    if spec.variant.dropout:
        yield f"DROPPED = {constants(dropped(spec.variant.dropout))}  # {spec.variant.dropout:g} of 2^32"


def constants(*values: object) -> str:
    """Values as Triton's constants."""
    return ", ".join(f"tl.constexpr({value})" for value in values)


def walk(stretches: int, every: Sequence[str] = ()) -> Holes:
    """How many tiles are met in one phase, and which; `every` are the statements before the third one, which meets all."""
    ends = [_loaded(range(n, min(n + 2, stretches))) for n in range(0, stretches, 2)]
    steps = " + ".join(f"stop_{n} - start_{n}" for n in range(stretches))
    ends += [f"steps = {steps}"] if stretches else ["begin, steps = tl.load(met), tl.load(met + 1)"]
    ends += [f"met += {2 * max(1, stretches)}"]
    tile = ["other = start_0 + step" if stretches else "other = tl.load(listed + begin + step)"]
    tile += [f"other += tl.where(other < stop_{n - 1}, 0, start_{n} - stop_{n - 1})" for n in range(1, stretches)]
    if not every:
        return {"steps": ends, "other tile": tile}
    return {
        "steps": either("phase == 2", every, ends),
        "other tile": ["other = step", "if phase < 2:", *(f"    {line}" for line in tile)],
    }


def _loaded(stretches: Sequence[int]) -> str:
    """The statement that reads where some stretches start and stop."""
    names = (f"start_{n}, stop_{n}" for n in stretches)
    return f"{', '.join(names)} = {', '.join(f'tl.load(met + {2 * n}), tl.load(met + {2 * n + 1})' for n in stretches)}"


def _identifier(name: str, taken: set[str]) -> str:
    """What a kernel calls a table, which then is taken; and so is what it calls the gradient."""
    plain = re.sub(r"\W", "_", name)
    stems = (plain, f"table_{plain}", *(f"table_{plain}{n}" for n in range(len(taken))))
    found = next(x for x in stems if x.isidentifier() and not iskeyword(x) and not {x, f"of_{x}"} & taken)
    taken |= {found, f"of_{found}"}
    return found
