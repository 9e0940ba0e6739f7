"""Lays queries out in blocks that meet the tiles of keys which a schedule names: any pattern, where lengths are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.planning.runs import Integers
from attn_compiler.targets.arrangement import Arrangement, Layout, gathered, in_a_row
from attn_compiler.targets.arrays import Arrays
from attn_compiler.targets.operands import PLACE, Operands
from attn_compiler.targets.walk import Walk

BATCH = 1 << 15  # what one more batch of blocks costs, in pairs of query and key


@dataclass(frozen=True)
class Tiles:
    """Blocks of queries, by their places, that meet equally many tiles of keys; a tile behind the last one is of no keys."""

    queries: Tensor  # [blocks, queries of a block]
    tiles: Tensor  # [blocks, tiles that each of them meets]
    exist: bool  # whether there are all the keys that these name


@dataclass(frozen=True)
class Tiling:
    """A walk as tensors: its blocks in batches, where each query's result is then, and where keys stand, if they are sorted."""

    batches: tuple[Tiles, ...]
    back: Tensor
    k_order: Tensor | None
    keys: int  # of a tile
    shows_all: bool

    def tensors(self) -> list[Tensor]:
        """All of them, to be handed to a trace one by one."""
        own = [x for batch in self.batches for x in (batch.queries, batch.tiles)]
        return [*own, self.back, *([] if self.k_order is None else [self.k_order])]

    def of(self, tensors: Sequence[Tensor]) -> Tiling:
        """The same, made of what a trace knows of each."""
        count = 2 * len(self.batches)
        given = zip(tensors[:count:2], tensors[1:count:2], self.batches, strict=True)
        order = None if self.k_order is None else tensors[count + 1]
        batches = tuple(Tiles(queries, tiles, old.exist) for queries, tiles, old in given)
        return replace(self, batches=batches, back=tensors[count], k_order=order)


def batched_cost(walk: Walk) -> int:
    """Pairs that are computed where blocks that meet about equally many tiles are computed together."""
    return sum(len(blocks) * most * walk.rows * walk.keys + BATCH for blocks, most in _batches(walk))


def tiling(walk: Walk, q_len: int, k_len: int) -> Tiling:
    """The tensors of a walk."""
    order = np.arange(q_len) if walk.q_order is None else walk.q_order
    missing = len(walk.begin) * walk.rows - q_len
    queries = np.concatenate([order, np.repeat(order[-1:], missing)]).reshape(-1, walk.rows)
    found = list(_batches(walk))
    rank = np.empty(len(walk.begin), np.int64)
    rank[np.concatenate([blocks for blocks, _ in found])] = np.arange(len(rank))
    back = np.empty(q_len, np.int64)
    back[order] = (rank[:, None] * walk.rows + np.arange(walk.rows)).reshape(-1)[:q_len]
    lists = (_tiles(walk, blocks, most, -(-k_len // walk.keys)) for blocks, most in found)
    batches = tuple(
        Tiles(torch.from_numpy(queries[blocks]), torch.from_numpy(tiles), int(tiles.max() + 1) * walk.keys <= k_len)
        for (blocks, _), tiles in zip(found, lists, strict=True)
    )
    k_order = None if walk.k_order is None else torch.from_numpy(walk.k_order)
    return Tiling(batches, torch.from_numpy(back), k_order, walk.keys, walk.full)


def tiled(operands: Operands, real: torch.dtype, by: Tiling) -> Layout:
    """Axes [batch, blocks, heads, tokens, dim], in as many parts as there are batches of blocks."""
    parts = tuple(_part(operands, real, by, batch) for batch in by.batches)

    def joined(found: Sequence[Tensor]) -> Tensor:
        return torch.cat([in_a_row(x) for x in found], dim=2).index_select(2, by.back)

    return Layout(parts, joined, shows_all=by.shows_all)


def _part(operands: Operands, real: torch.dtype, by: Tiling, batch: Tiles) -> Arrangement:
    device, k_len = operands.q.device, operands.k_len
    first_query, first_key = operands.first_query, operands.k_positions
    assert first_query is not None
    assert not isinstance(first_key, Tensor)
    listed = (batch.tiles[..., None] * by.keys + torch.arange(by.keys, device=device)).flatten(1)
    places = listed.clamp(max=k_len - 1)
    places = places if by.k_order is None else by.k_order[places]
    i, keys = batch.queries[:, None, :, None], places[:, None, None, :]
    symbols = {
        **operands.numbers(),
        **operands.head_coordinates(trailing=2),
        e.b: torch.arange(operands.q.shape[0], device=device).reshape(-1, 1, 1, 1, 1),
        e.i: i,
        e.q: i + first_query,
        PLACE: keys,
        e.k: keys + first_key,
    }
    at = {e.b: 5} | ({e.h: 3} if operands.head_numbers == tuple(range(operands.heads)) else {})
    q, k, v = gathered(operands.q, batch.queries), gathered(operands.k, places), gathered(operands.v, places)
    exists = None if batch.exist else (listed < k_len)[:, None, None, :]
    return Arrangement(q, k, v, Arrays(symbols, operands.tables, real, device, at), exists)


def _tiles(walk: Walk, blocks: Integers, most: int, none: int) -> Integers:
    """The tiles of some blocks, each list made as long as the longest by a tile that is none."""
    found = np.full((len(blocks), most), none, np.int64)
    for row, block in zip(found, blocks, strict=True):
        own = walk.tiles[walk.begin[block] : walk.end[block]]
        row[: len(own)] = own
    return found


def _batches(walk: Walk) -> Iterator[tuple[Integers, int]]:
    """Blocks that are computed together, and the most tiles that one of them meets: what costs least altogether."""
    counts = walk.end - walk.begin
    lengths, blocks = np.unique(counts, return_counts=True)
    pairs = walk.rows * walk.keys

    @cache
    def best(below: int) -> tuple[int, tuple[int, ...]]:
        """The cost of the blocks with the shortest lists, and where their batches end."""
        if not below:
            return 0, ()
        return min(
            (best(start)[0] + BATCH + int(blocks[start:below].sum() * lengths[below - 1]) * pairs, (*best(start)[1], below))
            for start in range(below)
        )

    start = 0
    for stop in best(len(lengths))[1]:
        inside = (counts >= lengths[start]) & (counts <= lengths[stop - 1])
        yield np.flatnonzero(inside), int(lengths[stop - 1])
        start = stop
