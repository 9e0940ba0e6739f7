"""Which tiles each tile meets, head by head and row by row of a batch, in the order of tokens that visits the fewest pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.layout import arrangements
from attn_compiler.planning.runs import Integers, Runs, Segments, sweep
from attn_compiler.planning.schedule import visits
from attn_compiler.runtime.kernels import Shape, masks_of
from attn_compiler.runtime.spans import filled, spans
from attn_compiler.targets.cpp.spec import FIRST_KEY, FIRST_QUERY, Spec
from attn_compiler.targets.triton.clip import Alike, alike, divided
from attn_compiler.targets.triton.source import Iteration

MOST_LISTED = 1 << 28  # tiles of all lists that are made on a device
MOST_STRETCHES = 4  # stretches of tiles that a kernel finds by counting; more stand in a list


@dataclass(frozen=True, eq=False)
class Met:
    """The runs of every schedule, and which schedule each head follows, row by row of the batch."""

    row_order: Integers | None
    column_order: Integers | None
    lengths: tuple[int, int]
    schedule_of: NDArray[np.int32]
    runs: tuple[Runs, ...]

    @property
    def tiles(self) -> int:
        return sum(one.count() for one in self.runs)

    @property
    def orders(self) -> tuple[Integers, Integers] | None:
        """Those of rows and of columns, where one of them is not that of tokens as they come."""
        if self.row_order is None and self.column_order is None:
            return None
        rows, columns = self.row_order, self.column_order
        rows = np.arange(self.lengths[0]) if rows is None else rows
        columns = np.arange(self.lengths[1]) if columns is None else columns
        return rows, columns


def met(
    shape: Shape, members: Sequence[int], in_positions: Expr, mask: Expr, tile: tuple[int, int], *, by_key: bool = False
) -> Met:
    """What tiles of queries meet, or with `by_key` tiles of keys: the same mask with the roles exchanged.

    `in_positions` is the mask before places were spelled out; `tile` is how many tokens stand in rows and in columns.
    """
    tables = {name: x.values() for name, x in zip(shape.names, shape.contents, strict=True) if x and name in mask.tables()}
    masks = list(masks_of(shape, members, mask, per_row=bool(tables)))
    down, along = shape.q_len, shape.k_len
    if by_key:
        down, along = along, down
        masks = [one.substitute({e.i: e.k, e.k: e.i}) for one in masks]
        in_positions = in_positions.substitute({e.q: e.k, e.k: e.q})
    order = list(dict.fromkeys(masks))
    schedule_of = np.array([order.index(one) for one in masks], np.int32)
    best = None
    for row_order, column_order in arrangements(in_positions, down, along, *tile):
        runs = (visits(one, down, along, tile, e.i, row_order, column_order, tables) for one in order)
        whole = tuple(_whole(one, along // tile[1]) for one in runs)
        found = Met(row_order, column_order, (down, along), schedule_of, whole)
        best = found if best is None or found.tiles < best.tiles else best
    assert best is not None
    return best


# Schedules, each in a row of the batch and for a head: the heads, the rows, the schedules.
Tasks = tuple[Integers, Integers, Integers]


@dataclass(frozen=True, eq=False)
class Visited:
    """How a kernel goes over what its tiles of queries meet, or its tiles of keys, and the arrays that say so.

    Where a part of the mask is `shown` by tables only, "met" are the spans of each tile of each schedule, [tiles, spans, 4],
    of which another kernel makes stretches for every task, or a list of tiles where tables are of `blocks`.
    """

    iteration: Iteration
    arrays: Mapping[str, Integers]
    shown: Expr = e.true
    tasks: Tasks | None = None
    blocks: Alike | None = None
    others: int = 0  # tiles that each tile may meet


def visited(
    shape: Shape, members: Sequence[int], variant: Variant, spec: Spec, tile: tuple[int, int], *, by_key: bool = False
) -> Visited:
    """What the tiles of one launch meet."""
    unknown = {name for name, contents in zip(shape.names, shape.contents, strict=True) if contents is None}
    firsts = {FIRST_QUERY: shape.first_query, FIRST_KEY: shape.first_key}
    for known, shown in dict.fromkeys(divided(spec.variant.mask, unknown, by) for by in (firsts, {})):
        found = met(shape, members, variant.mask, known, tile, by_key=by_key)
        cut = None if shown == e.true else _cut(found, members, shown, alike(shown, firsts), tile, by_key=by_key)
        if cut is not None:
            return cut
    found = met(shape, members, variant.mask, spec.variant.mask, tile, by_key=by_key)
    steps = walk(found)
    own = {"met": steps.numbers, "listed": steps.listed}
    arrays = _arrays(found, members, found.schedule_of, own, by_key=by_key)
    return Visited(Iteration(steps.stretches, found.orders is not None), arrays)


def _cut(
    found: Met, members: Sequence[int], shown: Expr, blocks: Alike | None, tile: tuple[int, int], *, by_key: bool
) -> Visited | None:
    """What is met if a kernel cuts it to what tables show; None where that takes too many stretches, or too long a list."""
    parts, ordered = [spans(one) for one in found.runs], found.orders is not None
    most = max(part.shape[1] for part in parts)
    of_head, tasks = _tasks(found.schedule_of, members, shown)
    others = -(-found.lengths[1] // tile[1])
    too_long = blocks and (ordered or len(tasks[0]) * len(parts[0]) * others > MOST_LISTED)
    if 2 * most > MOST_STRETCHES or too_long:
        return None
    own = {"met": np.concatenate([filled(part, most) for part in parts]), "listed": np.zeros(1, np.int64)}
    arrays = _arrays(found, members, of_head, own, by_key=by_key)
    return Visited(Iteration(0 if blocks else 2 * most, ordered), arrays, shown, tasks, blocks, others)


def _arrays(
    found: Met, members: Sequence[int], schedule_of: NDArray[np.int32], own: Mapping[str, Integers], *, by_key: bool
) -> Mapping[str, Integers]:
    """In the order in which kernels take them."""
    orders = found.orders or (np.zeros(1, np.int64),) * 2
    of_orders = dict(zip(("k_order", "q_order") if by_key else ("q_order", "k_order"), orders, strict=True))
    return {"members": np.array(members), "schedule_of": schedule_of, **own, **of_orders}


def _tasks(schedule_of: NDArray[np.int32], members: Sequence[int], shown: Expr) -> tuple[NDArray[np.int32], Tasks]:
    """Which task each head follows, row by row of the batch, and the head, the row and the schedule of each task."""
    heads = np.tile(np.array(members), len(schedule_of) // len(members))
    rows = np.arange(len(schedule_of)) // len(members)
    by_head, by_row = shown.mentions(e.h, e.kv), shown.mentions(e.b)
    asked = np.stack([heads if by_head else heads * 0 + members[0], rows * by_row, schedule_of], axis=1)
    tasks, of_head = np.unique(asked, axis=0, return_inverse=True)
    return of_head.reshape(-1).astype(np.int32), (tasks[:, 0], tasks[:, 1], tasks[:, 2])


def _whole(runs: Runs, complete: int) -> Runs:
    """The same, where a tile that reaches beyond the last key is never full."""
    full = runs.segments(True)
    clipped = Segments(full.row, np.minimum(full.start, complete), np.minimum(full.stop, complete))
    return sweep(runs.rows, runs.columns, [runs.segments(False)], [clipped])


@dataclass(frozen=True, eq=False)
class Walk:
    """What `Met` is to a kernel: for each tile of each schedule the stretches of its mixed tiles, then of its full ones.

    `numbers` are [tiles, 2, stretches, 2]: where each stretch starts and stops; those that are left over are empty. With
    `stretches` 0 they are [tiles, 2, 1, 2]: from where on in `listed` the tiles stand, and how many they are.
    """

    stretches: int
    numbers: Integers
    listed: Integers


def walk(met: Met) -> Walk:
    """How a kernel goes over the tiles that each tile meets."""
    kinds = [[_of_kind(one, full) for full in (False, True)] for one in met.runs]
    most = max((int(np.bincount(part.row).max()) for pair in kinds for part in pair if len(part.row)), default=1)
    rows = met.runs[0].rows
    if most <= MOST_STRETCHES:
        numbers = [np.stack([_stretches(part, rows, most) for part in pair], axis=1) for pair in kinds]
        return Walk(most, np.concatenate(numbers), np.zeros(1, np.int64))
    parts = [part for pair in kinds for part in pair]
    counts = [np.bincount(part.row, part.stop - part.start, rows).astype(np.int64) for part in parts]
    before = np.cumsum([0, *(count.sum() for count in counts)])
    numbers = [np.stack([np.cumsum(count) - count + n, count], axis=1) for count, n in zip(counts, before, strict=False)]
    of_tiles = np.stack(numbers).reshape(len(kinds), 2, rows, 1, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2, 1, 2)
    return Walk(0, of_tiles, np.concatenate([_tiles(part) for part in parts]))


def _of_kind(runs: Runs, full: bool) -> Segments:
    wanted = runs.full == full
    return Segments(runs.row_of_run[wanted], runs.start[wanted], runs.stop[wanted])


def _stretches(part: Segments, rows: int, most: int) -> Integers:
    """[rows, most, 2], of one kind."""
    found = np.zeros((rows, most, 2), np.int64)
    place = np.arange(len(part.row)) - np.searchsorted(part.row, part.row)
    found[part.row, place] = np.stack([part.start, part.stop], axis=1)
    # An empty one stands where the one before stops: then it is skipped by a shift of nothing.
    for n in range(1, most):
        found[:, n] = np.where(found[:, n, :1] < found[:, n, 1:], found[:, n], found[:, n - 1, 1:])
    return found


def _tiles(part: Segments) -> Integers:
    """All tiles of all stretches, one after the other."""
    count = part.stop - part.start
    first = part.start - (np.cumsum(count) - count)
    tiles: Integers = np.arange(int(count.sum())) + np.repeat(first, count)
    return tiles
