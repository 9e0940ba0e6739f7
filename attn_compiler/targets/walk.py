"""Which tiles of keys each block of queries visits, where all lengths are known: from the schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, const
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.layout import arrangements
from attn_compiler.planning.runs import Integers, Runs, joined
from attn_compiler.planning.schedule import visits
from attn_compiler.planning.table_values import TableValues
from attn_compiler.targets.exported import Spec
from attn_compiler.targets.operands import PLACE

Contents = Mapping[str, TableValues]  # of the tables that are known when exporting
TILES = ((64, 64), (64, 8), (128, 64), (128, 8))  # queries of a block, and keys that are visited together
STEP = 2048  # what starting a block costs, in pairs of query and key
MOST = 4  # patterns that heads may have of their own


@dataclass(frozen=True)
class Walk:
    """Block `n` of queries meets the tiles of keys `tiles[begin[n] : end[n]]`; orders list original places."""

    rows: int
    keys: int
    q_order: Integers | None
    k_order: Integers | None
    begin: Integers
    end: Integers
    tiles: Integers
    full: bool  # whether the mask shows all that is visited

    @property
    def cost(self) -> int:
        """Pairs that are computed, what starting blocks costs among them."""
        return len(self.tiles) * self.keys * self.rows + len(self.begin) * STEP


def walks(spec: Spec, heads: Sequence[int], variant: Variant, contents: Contents) -> list[tuple[tuple[int, ...], Walk]]:
    """Heads that visit the same tiles, and the walk that is cheapest for them."""
    mask = _as_stored(spec, spec.in_places(variant).mask.substitute({PLACE: e.k}))
    alike: dict[Expr, list[int]] = {}
    for head in heads:
        place = {e.b: _ANY_ROW, e.h: const(head), e.kv: const(head // (spec.heads // spec.kv_heads))}
        alike.setdefault(mask.substitute(place), []).append(head)
    if len(alike) > MOST:
        return [(tuple(heads), _cheapest(spec, list(alike), contents))]
    return [(tuple(members), _cheapest(spec, [own], contents)) for own, members in alike.items()]


def _as_stored(spec: Spec, mask: Expr) -> Expr:
    """The mask with tables read where they differ: heads that share one are alike."""
    shapes = {table.name: table.shape for table in spec.stored}

    def change(node: Expr) -> Expr:
        if node.op != "table" or node.value not in shapes:
            return node
        shape = shapes[str(node.value)]
        read = zip(shape, node.args[len(node.args) - len(shape) :], strict=True)
        return e.table(str(node.value), *(const(0) if size == 1 else at for size, at in read), sort=node.sort)

    return mask.transform(change)


_ANY_ROW = e.table("any row")


def _cheapest(spec: Spec, masks: Sequence[Expr], contents: Contents) -> Walk:
    return min(_candidates(spec, masks, contents), key=lambda walk: walk.cost)


def _candidates(spec: Spec, masks: Sequence[Expr], contents: Contents) -> Iterator[Walk]:
    assert isinstance(spec.q_len, int)
    assert isinstance(spec.k_len, int)
    for rows, keys in TILES:
        for q_order, k_order in arrangements(masks[0].substitute({e.i: e.q}), spec.q_len, spec.k_len, rows):
            found = joined([visits(one, spec.q_len, spec.k_len, (rows, keys), e.i, q_order, k_order, contents) for one in masks])
            yield _walk(found, rows, keys, q_order, k_order)


def _walk(runs: Runs, rows: int, keys: int, q_order: Integers | None, k_order: Integers | None) -> Walk:
    """Every block meets at least one tile: there is no softmax over nothing."""
    visited = [
        np.concatenate([np.arange(start, stop) for start, stop, _ in runs.row(row)] or [np.zeros(1, np.int64)])
        for row in range(runs.rows)
    ]
    every = all(runs.row(row) for row in range(runs.rows))
    ends = np.cumsum([len(tiles) for tiles in visited])
    begins = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    return Walk(
        rows, keys, q_order, k_order, begins, ends.astype(np.int64), np.concatenate(visited), every and bool(runs.full.all())
    )
