"""The kernel for few queries: which keys they may meet is worked out from positions when it runs."""

from __future__ import annotations

from functools import lru_cache

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.bounds import distance
from attn_compiler.algebra.expr import Expr, const
from attn_compiler.targets.cpp.printer import KEYS_IN_LANES
from attn_compiler.targets.cpp.source import assembled, printer_of
from attn_compiler.targets.cpp.spec import FIRST_QUERY, Q_POSITIONS, Spec
from attn_compiler.targets.reach import reach

MOST_QUERIES = 16
FAR = 1 << 40  # a distance that no two tokens have


@lru_cache(maxsize=256)
def decoding(spec: Spec) -> str:
    """The source for a spec."""
    printer = printer_of(spec, KEYS_IN_LANES)
    assert spec.factor is not None
    holes = {
        "position": printer.function(position_of(spec)),
        "visible": printer.function(spec.variant.mask, real="exact"),
        "score": printer.function(spec.score),
        "weight": printer.function(const(0.0) if spec.by_peak else spec.variant.normalizer.weight),
        "factor": printer.function(spec.factor),
        "total": printer.function(const(0.0) if spec.total is None else spec.total),
    }
    normed = any(part.mentions(e.k_norm) for part in spec.parts())
    constants = (
        f"constexpr bool ALL = {str(spec.variant.mask == e.true).lower()};  // every query sees every key",
        f"constexpr bool BY_HEAD = {str(spec.variant.mask.mentions(e.h)).lower()};  // heads see other keys than their neighbors",
        f"constexpr bool NORMS = {str(normed).lower()};  // what a pair is worth depends on the length of its key",
    )
    codes = ("codes.h",) if spec.rows else ()
    return assembled(spec, printer, holes, ("rows.h", *codes, "view.h", "empty.h", "decode.cpp"), MOST_QUERIES, *constants)


def reach_of(mask: Expr, *, k_counted: bool) -> tuple[int, int, int]:
    """How far a mask reaches, as `distances` says it; keys that are not counted may stand anywhere."""
    return distances(mask) if k_counted else (-FAR, FAR, 0)


def distances(mask: Expr) -> tuple[int, int, int]:
    """The least and the largest q - k of visible keys that are not among so many first ones. `mask` is in positions."""
    within = reach(mask)
    if within is not None:
        return within.nearest, within.farthest, within.prefix
    nearest, farthest = (int(max(-FAR, min(FAR, end))) for end in distance(mask))
    return nearest, farthest, 0


def position_of(spec: Spec) -> Expr:
    """The position of a query; where only its table tells, as the mask reads it."""
    reads = (node for node in spec.variant.mask.walk() if node.op == "table" and node.value == Q_POSITIONS)
    return next(reads, e.i + FIRST_QUERY)
