"""Fills the holes of a skeleton: a spec becomes a C++ file that reads as if written by hand."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import lru_cache

from attn_compiler.algebra.expr import const
from attn_compiler.algebra.storage import PLAIN
from attn_compiler.algebra.variant import EmptyRows, Variant
from attn_compiler.library import folder
from attn_compiler.targets.cpp import dropout
from attn_compiler.targets.cpp.printer import LEAVES, Dialect, Leaves, Level, Printer
from attn_compiler.targets.cpp.spec import Spec, Unit

_HOLE = re.compile(r"^([ \t]*)// <(.+)>\n", re.MULTILINE)
_EMPTY_ROWS = {EmptyRows.ZERO: "ZERO", EmptyRows.MEAN: "MEAN", EmptyRows.NAN: "NOT_A_NUMBER", EmptyRows.UNMASKED: "UNMASKED"}


@lru_cache(maxsize=256)
def source(spec: Spec) -> str:
    """The forward kernel of a spec."""
    printer = printer_of(spec)
    assert spec.factor is not None
    holes = {
        "visible": printer.function(spec.variant.mask, real="exact"),
        "score": printer.function(spec.score),
        "weight": printer.function(const(0.0) if spec.by_peak else spec.variant.normalizer.weight),
        "factor": printer.function(spec.factor),
        "total": printer.function(const(0.0) if spec.total is None else spec.total),
        "drop": dropout.in_forward() if spec.variant.dropout else (),
    }
    return assembled(spec, printer, holes, ("rows.h", "tiles.h", unit_of(spec), "view.h", "empty.h", "forward.cpp"), chunk(spec))


def printer_of(spec: Spec, leaves: Leaves = LEAVES) -> Printer:
    """A printer that knows the tables of a spec."""
    tables = {name: (number, stored) for number, (name, stored) in enumerate(spec.tables)}
    return Printer(_dialect(), tables, spec.wide, {spec.variant.scale: "scale"}, leaves)


def assembled(
    spec: Spec,
    printer: Printer,
    holes: Mapping[str, Sequence[str]],
    skeletons: Sequence[str],
    chunk: int | str,
    *more: str,
    by_query: bool = True,
) -> str:
    """The skeletons with their holes filled; `more` are constants that only they know, with `by_query` queries stand in lanes."""
    scopes: dict[str, Sequence[str]] = {}
    for level, name in ((Level.LANE, "per lane"), (Level.ROW, "per row"), (Level.TASK, "per task")):
        scopes[f"{name}: fields"], scopes[f"{name}: values"] = printer.scope(level)
    if spec.variant.dropout:
        skeletons = ("dropout.h", *skeletons)
        more = (*more, *dropout.constants(spec))
        scopes = {name: (*lines, *dropout.scopes(spec, by_query=by_query)[name]) for name, lines in scopes.items()}
    body = _filled("\n".join(_skeleton(name) for name in skeletons), {**holes, **scopes})
    return "\n".join((_skeleton("lanes.h"), *_constants(spec, chunk), *more, "", body))


def unit_of(spec: Spec) -> str:
    """The skeleton of what multiplies."""
    return "matrix_unit.h" if spec.unit is Unit.TILES else "vector_unit.h"


def chunk(spec: Spec) -> int:
    """How many keys meet a tile of queries together: their scores stay in the first cache."""
    return 64 if spec.unit is Unit.TILES else 128


@lru_cache
def probe(unit: Unit) -> str:
    """A program that measures how fast this machine multiplies bfloat16."""
    spec = Spec(Variant(), 64, 64, "bfloat16", (), unit)
    skeletons = ("rows.h", "tiles.h", unit_of(spec), "probe.cpp")
    return "\n".join((_skeleton("lanes.h"), *_constants(spec, chunk(spec)), "", *map(_skeleton, skeletons)))


@lru_cache
def encoder(dtype: str, dim: int, largest: float) -> str:
    """A program that makes codes of operands."""
    stored = f"typedef {_dialect()['stored'][dtype]} Stored;"
    constants = (stored, f"constexpr int DIM = {dim};", f"constexpr float LARGEST = {largest:.1f}f;")
    return "\n".join((_skeleton("lanes.h"), *constants, "", _skeleton("rows.h"), _skeleton("encode.cpp")))


def _constants(spec: Spec, chunk: int | str) -> tuple[str, ...]:
    index, stored = "int64_t" if spec.wide else "int32_t", _dialect()["stored"]
    return (
        f"typedef {stored[spec.operands]} Stored;",
        f"typedef {stored[spec.values]} Value;",
        f"typedef {stored[spec.dtype]} Output;",
        f"typedef {index} index_t;",
        f"typedef {'vl' if spec.wide else 'vi'} vindex;",
        f"constexpr int VECTORS = {_vectors(spec)}, TILE = LANES * VECTORS;  // of tokens at work together",
        f"constexpr int DIM = {spec.dim}, VALUE_DIM = {spec.value_dim}, CHUNK = {chunk};",
        f"constexpr int STEP = {_step(spec.operands, spec)};  // numbers of q and k that are multiplied at once",
        f"constexpr int VALUE_STEP = {_step(spec.values, spec)};  // the same of weights and v",
        "constexpr bool PAIRED = STEP == 2;",
        f"constexpr int DEPTH = {16 if spec.unit is Unit.TILES else 1};  // rows of lanes that are multiplied at once",
        f"constexpr float MOST_WEIGHT = {spec.most_weight:.1f}f;",
        f"constexpr int TABLES = {max(1, len(spec.tables))};{_remark(spec)}",
        "typedef ContextOf<TABLES> Context;",
        f"constexpr bool PEAK = {str(spec.by_peak).lower()};  // weights are relative to a row's largest score",
        "enum { ZERO, MEAN, NOT_A_NUMBER, UNMASKED };",
        f"constexpr int EMPTY_ROWS = {_EMPTY_ROWS[spec.variant.empty_rows]};  // what a query gets that sees no key",
    )


def _vectors(spec: Spec) -> str:
    """What is done for each row counts more the faster it meets a vector."""
    if spec.unit is Unit.TILES:
        return "4"
    return "LANES == 16 ? 2 : 3" if spec.variant.storage == PLAIN else "3"


def _step(stored: str, spec: Spec) -> str:
    """How many numbers of a type are multiplied at once."""
    if stored in ("biased", "int8") and spec.dim % 4 == 0:
        return "BYTES ? 4 : 1"
    return "2" if spec.unit is not Unit.FLOATS and stored == "bfloat16" else "1"


def _remark(spec: Spec) -> str:
    return f"  // the tables are {', '.join(name for name, _ in spec.tables)}" if spec.tables else ""


def _filled(skeleton: str, holes: Mapping[str, Sequence[str]]) -> str:
    return _HOLE.sub(lambda hole: "".join(f"{hole[1]}{line}\n" for line in holes[hole[2]]), skeleton)


@lru_cache
def _skeleton(name: str) -> str:
    return (folder("codegen") / "cpp" / name).read_text(encoding="utf-8")


@lru_cache
def _dialect() -> Dialect:
    return tomllib.loads(_skeleton("dialect.toml"))
