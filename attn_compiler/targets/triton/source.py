"""Fills the holes of a skeleton: a spec becomes a Triton file that reads as if written by hand."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from keyword import iskeyword

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort, const
from attn_compiler.algebra.variant import EmptyRows
from attn_compiler.library import folder
from attn_compiler.targets.cpp.printer import Dialect, Level
from attn_compiler.targets.cpp.spec import Spec
from attn_compiler.targets.triton.printer import INSIDE, LEAVES, LOG2E, Printer

NARROWEST = 16  # numbers that tensor cores multiply at least
# A comment `# <name>` is a hole, with the rest of its line; what stands before is a stand-in, or what follows up to `# </name>`.
_HOLE = re.compile(r"^([ \t]*)(?:# <([^/>]+)>\n(?:.*\n)*?\1# </\2>|(?:\S.*  )?# <([^/>]+)>)\n", re.MULTILINE)
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


@lru_cache(maxsize=256)
def source(spec: Spec, iteration: Iteration) -> str:
    """The forward kernel of a spec."""
    whole = skeleton("forward.py")
    taken = set(re.findall(r"\w+", whole))
    tables = {name: (_identifier(name, taken), stored) for name, stored in spec.tables}
    leaves = {**LEAVES, e.peak: ("(peak * LN2)", Level.LANE)} if spec.by_peak else LEAVES
    names = dict.fromkeys((spec.variant.scale, in_base_two(spec.variant.scale)), "scale")
    printer = Printer(_dialect(), tables, names, taken | {name for name, _ in tables.values()}, leaves)
    assert spec.factor is not None
    fills = spec.variant.empty_rows in (EmptyRows.MEAN, EmptyRows.UNMASKED)
    holes = {
        "constants": list(_constants(spec, iteration, fills)),
        "tables": [f"{', '.join(name for name, _ in tables.values())}{',' * (len(tables) == 1)} = tables"] if tables else [],
        "steps": _steps(iteration.stretches, fills),
        "key tile": _key_tile(iteration.stretches, fills),
        "visible": printer.assign("visible", INSIDE if spec.variant.mask == e.true else INSIDE & spec.variant.mask, real="exact"),
        "score": printer.assign("score", in_base_two(spec.score) if spec.by_peak else spec.score),
        "weight": printer.assign("weight", spec.variant.normalizer.weight),
        "result": [
            *printer.assign("factor", spec.factor),
            *printer.assign("total", const(0.0) if spec.total is None else spec.total),
            f"filling = {_FILLING[spec.variant.empty_rows]}",
            *(() if spec.variant.empty_rows is EmptyRows.MEAN else ("seen = peak != -INFINITY",)),
        ],
    }
    scopes = {"per key": Level.ROW, "per query": Level.LANE, "per head": Level.TASK}
    holes |= {name: printer.scope(level) for name, level in scopes.items()}
    facts = {
        "BY_PEAK": spec.by_peak,
        "FILLS": fills,
        "MEAN": spec.variant.empty_rows is EmptyRows.MEAN,
        "ORDERED": iteration.ordered,
    }
    return _with_tools("\n".join((*_specialized(filled(whole, holes).splitlines(), facts), "")))


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


def _constants(spec: Spec, iteration: Iteration, fills: bool) -> Iterator[str]:
    dims = (spec.dim, spec.value_dim)
    widths = (max(NARROWEST, 1 << (dim - 1).bit_length()) for dim in dims)
    infinity = 'float("inf")'
    yield f"DIM, VALUE_DIM = {_constant(*dims)}  # numbers of a query or a key, and of a value"
    yield f"WIDTH, VALUE_WIDTH = {_constant(*widths)}  # the same, up to a power of two"
    yield f"PHASES, STRETCHES = {_constant(2 + fills, max(1, iteration.stretches))}"
    yield f"INFINITY, LN2, LOG2E = {_constant(infinity, math.log(2), LOG2E)}"


def _constant(*values: object) -> str:
    return ", ".join(f"tl.constexpr({value})" for value in values)


def _steps(stretches: int, fills: bool) -> list[str]:
    """How many tiles of keys are met in one phase, and where they stand."""
    lines = [f"start_{n}, stop_{n} = tl.load(met + {2 * n}), tl.load(met + {2 * n + 1})" for n in range(stretches)]
    steps = " + ".join(f"stop_{n} - start_{n}" for n in range(stretches))
    lines += [f"steps = {steps}"] if stretches else ["begin, steps = tl.load(met), tl.load(met + 1)"]
    lines += [f"met += {2 * max(1, stretches)}"]
    if not fills:
        return lines
    every = "steps = tl.where(tl.min(tl.cast(seen, tl.int32)) == 0, tl.cdiv(k_len, BLOCK_K), 0)"
    return ["if phase == 2:", "    seen = peak != -INFINITY", f"    {every}", "else:", *(f"    {line}" for line in lines)]


def _key_tile(stretches: int, fills: bool) -> list[str]:
    lines = ["key_tile = start_0 + step" if stretches else "key_tile = tl.load(listed + begin + step)"]
    lines += [f"key_tile += tl.where(key_tile < stop_{n - 1}, 0, start_{n} - stop_{n - 1})" for n in range(1, stretches)]
    return ["key_tile = step", "if phase < 2:", *(f"    {line}" for line in lines)] if fills else lines


def _identifier(name: str, taken: set[str]) -> str:
    """What a kernel calls a table."""
    plain = re.sub(r"\W", "_", name)
    return plain if plain.isidentifier() and not iskeyword(plain) and plain not in taken else f"table_{plain}"


def filled(text: str, holes: Mapping[str, Sequence[str]]) -> str:
    """A skeleton with lines in the place of its holes."""
    return _HOLE.sub(lambda hole: "".join(f"{hole[1]}{line}\n" for line in holes[hole[2] or hole[3]]), text)


def _specialized(lines: Sequence[str], facts: Mapping[str, bool]) -> list[str]:
    """The lines of `if FACT:` and `else:` where they hold, and none of the others."""
    found: list[str] = []
    n = 0
    while n < len(lines):
        asked = re.fullmatch(r"( *)if (\w+):", lines[n])
        if not asked or asked[2] not in facts:
            found.append(lines[n])
            n += 1
            continue
        yes = _block(lines, n + 1, asked[1])
        n += 1 + len(yes)
        no = _block(lines, n + 1, asked[1]) if lines[n : n + 1] == [f"{asked[1]}else:"] else []
        n += len(no) + bool(no)
        found += _specialized([line[4:] for line in (yes if facts[asked[2]] else no)], facts)
    return found


def _block(lines: Sequence[str], start: int, indent: str) -> Sequence[str]:
    """The lines from `start` on that are indented further."""
    inside = takewhile(lambda line: line.startswith(f"{indent} "), lines[start:])
    return list(inside)


def _with_tools(text: str) -> str:
    """With the functions that the kernel calls, in the place of the import."""
    tools = {match[1]: match[0] for match in _FUNCTION.finditer(skeleton("tiles.py"))}
    needed, frontier = set[str](), {text}
    while frontier:
        called = {name for body in frontier for name in tools if f"{name}(" in body} - needed
        needed |= called
        frontier = {tools[name] for name in called}
    head, _, kernels = _IMPORT.sub("", text).partition("\n\n\n")
    return "\n\n\n".join((head, *(body.rstrip() for name, body in tools.items() if name in needed), kernels))


_FUNCTION = re.compile(r"^@triton\.jit\ndef (\w+)\(.*\n(?:(?:    .*)?\n)*", re.MULTILINE)
_IMPORT = re.compile(r"^from tiles import .*\n", re.MULTILINE)


@lru_cache
def skeleton(name: str) -> str:
    """A file of `codegen/triton`."""
    return (folder("codegen") / "triton" / name).read_text(encoding="utf-8")


@lru_cache
def _dialect() -> Dialect:
    return tomllib.loads(skeleton("dialect.toml"))
