"""The tokens of one axis, cut into tiles: extremes per tile of whatever speaks of one token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from numpy.typing import NDArray

from attn_compiler.algebra.expr import Expr
from attn_compiler.planning.extents import Extent, Tables, Values, extent

_TOKENS_AT_ONCE = 1 << 16  # what is worked on stays in the cache, however long the axis


@dataclass(frozen=True)
class Tokens:
    """`length` tokens in tiles of `tile`; `index` is the symbol that counts them, `named` follows from it."""

    length: int
    tile: int
    index: Expr
    order: NDArray[np.int64] | None  # the original index of the token at each place; None: as they come
    named: Mapping[Expr, Expr]
    tables: Tables
    _levels: dict[Expr, list[Extent]] = field(default_factory=dict)

    @property
    def tiles(self) -> int:
        return -(-self.length // self.tile)

    def extremes(self, e: Expr, level: int = 0) -> Extent:
        """Bound `e` on every run of 2 ** level tiles."""
        found = self._levels.setdefault(e, [])
        if not found:
            found.append(self._tiles(e))
        while len(found) <= level:
            found.append(_reduced(found[-1], 2))
        return found[level]

    def _tiles(self, e: Expr) -> Extent:
        step = max(1, _TOKENS_AT_ONCE // self.tile) * self.tile
        parts = [
            _reduced(self.values(e, start, min(start + step, self.length)), self.tile) for start in range(0, self.length, step)
        ]
        lo: Values = np.concatenate([part.lo for part in parts])
        hi: Values = np.concatenate([part.hi for part in parts])
        return Extent(lo, hi)

    def values(self, e: Expr, start: int, stop: int) -> Extent:
        """`e` at each of the tokens from place `start` to `stop`."""
        at = np.arange(start, stop) if self.order is None else self.order[start:stop]
        leaves = {self.index: Extent.point(at.astype(np.float64))}
        for name, meaning in self.named.items():
            leaves[name] = extent(meaning, leaves, self.tables)
        found = extent(e, leaves, self.tables)
        lo = cast(Values, np.broadcast_to(found.lo, at.shape))
        hi = lo if found.is_point else cast(Values, np.broadcast_to(found.hi, at.shape))
        return Extent(lo, hi)


def _reduced(values: Extent, by: int) -> Extent:
    starts = np.arange(0, len(values.lo), by)
    if values.lo.dtype == bool:
        return Extent(np.logical_and.reduceat(values.lo, starts), np.logical_or.reduceat(values.hi, starts))
    lo: Values = np.minimum.reduceat(values.lo, starts)
    hi: Values = np.maximum.reduceat(values.hi, starts)
    return Extent(lo, hi)
