"""The kernels for few queries: one that meets slices of the keys, one that merges what these have found."""

from __future__ import annotations

from functools import lru_cache

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.variant import EmptyRows
from attn_compiler.targets.cpp.decode import position_of
from attn_compiler.targets.cpp.printer import Leaves, Level
from attn_compiler.targets.cpp.spec import Spec
from attn_compiler.targets.triton import coded
from attn_compiler.targets.triton.printer import INSIDE, LEAVES
from attn_compiler.targets.triton.source import assembled, constants, pair, printer_of, result

# The queries of all heads that share their keys stand in one tile: what follows the head differs from row to row.
_BY_QUERY: Leaves = {
    **LEAVES,
    INSIDE: ("(column < end)", Level.ROW),
    e.h: ("h", Level.LANE),
    e.k_norm: ("norm(keys).T", Level.PAIR),  # computed once keys are there, which the mask decides
}


@lru_cache(maxsize=256)
def decoding(spec: Spec, reach: tuple[int, int, int], *, every: bool = False) -> str:
    """The kernel for the slices; with `every`, the one for queries that saw no key, which then meet all.

    `reach` is the least and the largest distance back to a key that is seen, besides so many first ones.
    """
    printer = printer_of(spec, "decode.py", _BY_QUERY)
    holes = {
        **pair(printer, spec, INSIDE),
        **coded.products(spec),
        **coded.loaded(spec),
        "position": printer.assign("position", position_of(spec)),
    }
    nearest, farthest, first = reach
    bounds = f"NEAREST, FARTHEST, FIRST_KEYS = {constants(nearest, farthest, first)}  # distances back to what is seen; positions"
    if every:
        holes["visible"] = ["visible = (column < end) & left"]
    facts = {"EVERY": every, "MEAN": every and spec.variant.empty_rows is EmptyRows.MEAN}
    return assembled("decode.py", spec, printer, holes, facts, bounds)


@lru_cache(maxsize=256)
def merging(spec: Spec) -> str:
    """The kernel that merges slices."""
    printer = printer_of(spec, "merge.py")
    return assembled("merge.py", spec, printer, {"result": result(printer, spec)}, {})
