"""Key ranges in closed form: where a mask is made of comparisons monotone in the key, a search answers for a query tile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attn_compiler.planning.atoms import Alone, Any, Below, Both, Formula, Opaque, Side
from attn_compiler.planning.extents import Extent, Tables, Values
from attn_compiler.planning.runs import Integers, Runs, Segments, sweep
from attn_compiler.planning.tokens import Tokens

_MOST_RANGES = 64

Range = tuple[Integers, Integers]  # of key tiles, one per query tile
Ranges = list[Range]


@dataclass(frozen=True)
class Visible:
    """Ranges that hold all key tiles where something is visible, and ranges in which everything is."""

    somewhere: Ranges
    everywhere: Ranges


def solve(mask: Formula, queries: Tokens, keys: Tokens, tables: Tables) -> Runs | None:
    """The runs of `mask`; None where some comparison is not monotone, or where there are too many ranges."""
    visible = _visible(mask, queries, keys, tables)
    if visible is None:
        return None
    visited, full = ([_segments(part) for part in ranges] for ranges in (visible.somewhere, visible.everywhere))
    return sweep(queries.tiles, keys.tiles, visited, full)


def _segments(ranges: Range) -> Segments:
    return Segments(np.arange(len(ranges[0])), *ranges)


def _visible(mask: Formula, queries: Tokens, keys: Tokens, tables: Tables) -> Visible | None:
    match mask:
        case Both(parts) | Any(parts):
            solved = [_visible(part, queries, keys, tables) for part in parts]
            known = [part for part in solved if part is not None]
            return _combined(known, isinstance(mask, Both)) if len(known) == len(solved) else None
        case Below(key, query, strict):
            return _below(keys.extremes(key), queries.extremes(query), strict, keys.tiles)
        case Alone(condition, Side.KEY):
            return _columns(keys.extremes(condition), queries.tiles)
        case Alone(condition, _):
            return _rows(queries.extremes(condition), keys.tiles)
        case Opaque(condition):
            nowhere_known = bool(condition.tables() - tables.keys())
            return Visible([_everything(queries, keys)], []) if nowhere_known else None


def _everything(queries: Tokens, keys: Tokens) -> Range:
    return np.zeros(queries.tiles, np.int64), np.full(queries.tiles, keys.tiles)


def _combined(parts: list[Visible], conjunction: bool) -> Visible | None:
    somewhere, everywhere = parts[0].somewhere, parts[0].everywhere
    for part in parts[1:]:
        if conjunction:
            somewhere, everywhere = _both(somewhere, part.somewhere), _both(everywhere, part.everywhere)
        else:
            somewhere, everywhere = somewhere + part.somewhere, everywhere + part.everywhere
        if max(len(somewhere), len(everywhere)) > _MOST_RANGES:
            return None
    return Visible(somewhere, everywhere)


def _both(one: Ranges, other: Ranges) -> Ranges:
    pairs = ((np.maximum(a[0], b[0]), np.minimum(a[1], b[1])) for a in one for b in other)
    return [pair for pair in pairs if (pair[0] < pair[1]).any()]


def _below(key: Extent, query: Extent, strict: bool, tiles: int) -> Visible | None:
    somewhere = _search(key.lo, query.hi, strict, tiles)
    everywhere = _search(key.hi, query.lo, strict, tiles)
    return None if somewhere is None or everywhere is None else Visible([somewhere], [everywhere])


def _search(key: Values, query: Values, strict: bool, tiles: int) -> Range | None:
    """The tiles with `key <= query` (or `<`), where `key` rises or falls along the axis."""
    if (key[1:] >= key[:-1]).all():
        return np.zeros(len(query), np.int64), np.searchsorted(key, query, "left" if strict else "right")
    if (key[1:] <= key[:-1]).all():
        return tiles - np.searchsorted(key[::-1], query, "left" if strict else "right"), np.full(len(query), tiles)
    return None


def _rows(condition: Extent, tiles: int) -> Visible:
    return Visible(*([(np.zeros(len(x), np.int64), np.where(x, tiles, 0))] for x in (condition.hi, condition.lo)))


def _columns(condition: Extent, rows: int) -> Visible | None:
    somewhere, everywhere = (_stretches(x, rows) for x in (condition.hi, condition.lo))
    return None if max(len(somewhere), len(everywhere)) > _MOST_RANGES else Visible(somewhere, everywhere)


def _stretches(holds: Values, rows: int) -> Ranges:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], holds, [False])).astype(np.int8)))
    if len(edges) > 2 * _MOST_RANGES:
        edges = edges[: 2 * _MOST_RANGES + 2]  # too many already: the caller gives up
    return [(np.full(rows, start), np.full(rows, stop)) for start, stop in edges.reshape(-1, 2)]
