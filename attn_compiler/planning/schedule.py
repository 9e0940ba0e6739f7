"""Which key tiles each query tile visits, and how: from the mask's formula alone, never from its values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from attn_compiler.algebra.bounds import Occupancy
from attn_compiler.algebra.expr import Expr, Scalar, b, const, h, heads, i, k, k_len, kv, layer, layers, q, q_len
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError
from attn_compiler.planning.atoms import atoms, formula
from attn_compiler.planning.cost import Saving, saving
from attn_compiler.planning.draw import draw
from attn_compiler.planning.ranges import solve
from attn_compiler.planning.raster import sketch
from attn_compiler.planning.refine import Analysis, refine
from attn_compiler.planning.runs import Integers, Runs, joined, sweep
from attn_compiler.planning.table_values import TableValues
from attn_compiler.planning.tokens import Tokens


@dataclass(frozen=True)
class Panel:
    """Query heads that visit the same tiles."""

    heads: tuple[int, ...]
    mask: Expr
    runs: Runs


@dataclass(frozen=True)
class Schedule:
    """The tiles an attention visits. Without a `head`, methods answer for all heads together."""

    variant: Variant
    q_len: int
    k_len: int
    tile: tuple[int, int]
    panels: tuple[Panel, ...]

    def runs(self, q_tile: int, head: int | None = None) -> tuple[tuple[int, int, Occupancy], ...]:
        """The runs (start, stop, occupancy) of key tiles that a query tile visits."""
        return self.of(head).row(q_tile)

    def tiles(self, head: int | None = None) -> Iterator[tuple[int, int, Occupancy]]:
        """Every visited tile as (q_tile, k_tile, occupancy)."""
        return self.of(head).tiles()

    def of(self, head: int | None = None) -> Runs:
        """The runs of one head, or those that serve every head."""
        if head is None:
            return joined([panel.runs for panel in self.panels])
        found = [panel.runs for panel in self.panels if head in panel.heads]
        if not found:
            raise ShapeError(f"there is no head {head}: heads are 0 … {self.heads - 1}")
        return found[0]

    @property
    def heads(self) -> int:
        return sum(len(panel.heads) for panel in self.panels)

    @property
    def visited_pairs(self) -> int:
        """Pairs of query and key in visited tiles, over all heads."""
        return sum(len(panel.heads) * self._pairs(panel.runs) for panel in self.panels)

    @property
    def visited_keys(self) -> int:
        """Keys read by the query tiles one after the other, over all heads."""
        return sum(len(panel.heads) * int(self._width(panel.runs).sum()) for panel in self.panels)

    @property
    def density(self) -> float:
        """The part of all pairs that lies in visited tiles."""
        everything = self.heads * self.q_len * self.k_len
        return self.visited_pairs / everything if everything else 0.0

    def panel_density(self, panel: Panel) -> float:
        """The same, for the heads of one panel."""
        everything = self.q_len * self.k_len
        return self._pairs(panel.runs) / everything if everything else 0.0

    def cost(self, heads: int, head_dim: int, value_dim: int, dtype: str) -> Saving:
        """What `heads` such heads cost, dense and scheduled."""
        return saving(self, heads, head_dim, value_dim, dtype)

    def draw(self, path: str | Path) -> None:
        """Write a picture; the ending of `path` says in which format."""
        draw(self, path)

    def text(self, width: int = 64, head: int | None = None) -> str:
        """Sketch with characters: `·` empty, `▒` mixed, `█` full."""
        return sketch(self.of(head), width)

    def _width(self, runs: Runs) -> Integers:
        return np.minimum(runs.stop * self.tile[1], self.k_len) - runs.start * self.tile[1]

    def _pairs(self, runs: Runs) -> int:
        row, q_tile = runs.row_of_run, self.tile[0]
        tall = np.minimum((row + 1) * q_tile, self.q_len) - row * q_tile
        return int((tall * self._width(runs)).sum())


def schedule(
    variant: Variant,
    q_len: int,
    k_len: int,
    *,
    tile: tuple[int, int] = (64, 64),
    heads: int = 1,
    kv_heads: int | None = None,
    tables: Mapping[str, ArrayLike] | None = None,
    values: Mapping[str, Scalar] | None = None,
    layer: int = 0,
    layers: int = 1,
    position: Expr | None = None,
    order: ArrayLike | None = None,
) -> Schedule:
    """Classify every tile. `tables` sharpen what depends on them; `order` lists the original positions as they are laid out.

    `position` is the position of query `i`; without it the last query meets the last key.
    """
    kv_heads = kv_heads or heads
    _check(q_len, k_len, tile, heads, kv_heads)
    known = {name: TableValues(table) for name, table in (tables or {}).items()}
    known.update({table.name: TableValues(table.make(k_len)) for table in variant.derived if table.name not in known})
    call = _Call(q_len, k_len, tile, i + (k_len - q_len) if position is None else position, order, known)
    sizes = dict(zip(_SIZES, map(const, (q_len, k_len, heads, layer, layers)), strict=True))
    panels: dict[bytes, Panel] = {}
    seen: dict[Expr, Runs] = {}
    for members, mask in _masks(variant, heads):
        for head in members:
            place = {**sizes, h: const(head), kv: const(head // (heads // kv_heads))}
            mine = _with_values(mask.substitute(place), values or {})
            runs = seen[mine] = seen[mine] if mine in seen else call.runs(mine)
            before = panels.get(runs.key())
            panels[runs.key()] = Panel((*(before.heads if before else ()), head), before.mask if before else mask, runs)
    return Schedule(variant, q_len, k_len, tile, tuple(panels.values()))


_SIZES = (q_len, k_len, heads, layer, layers)


def _with_values(mask: Expr, values: Mapping[str, Scalar]) -> Expr:
    return mask.substitute({leaf: const(values[str(leaf.value)]) for leaf in mask.symbols() if leaf.value in values})


def _check(q_len: int, k_len: int, tile: tuple[int, int], heads: int, kv_heads: int) -> None:
    if min(q_len, k_len) < 0 or min(tile) < 1:
        raise ShapeError(f"lengths are at least 0 and tiles at least 1, not {q_len} x {k_len} in tiles of {tile}")
    if heads < 1 or heads % kv_heads:
        raise ShapeError(f"{heads} query heads cannot share {kv_heads} kv heads: expected a multiple of the kv heads")


def _masks(variant: Variant, count: int) -> Iterator[tuple[Sequence[int], Expr]]:
    """Heads and the mask they follow."""
    rest = set(range(count))
    for members, own in variant.groups:
        mine = sorted(members.members(count))
        rest -= set(mine)
        yield mine, own.mask
    yield sorted(rest), variant.mask


def visits(
    mask: Expr,
    q_len: int,
    k_len: int,
    tile: tuple[int, int],
    position: Expr,
    query_order: Integers | None,
    key_order: Integers | None,
    tables: Mapping[str, TableValues],
) -> Runs:
    """The runs of one mask in one row, its tokens laid out in the given orders."""
    if not (q_len and k_len):
        return sweep(-(-q_len // tile[0]), -(-k_len // tile[1]), [], [])
    keys = Tokens(k_len, tile[1], k, key_order, {}, tables)
    queries = Tokens(q_len, tile[0], i, query_order, {q: position}, tables)
    parts = formula(mask)
    solved = solve(parts, queries, keys, tables)
    if solved is not None:
        return solved
    analysis = Analysis(parts, queries, keys, tables)
    return refine(analysis, any(analysis.undecided(atom) for atom in atoms(parts)))


@dataclass(frozen=True)
class _Call:
    q_len: int
    k_len: int
    tile: tuple[int, int]
    position: Expr
    order: ArrayLike | None
    tables: Mapping[str, TableValues]

    def runs(self, mask: Expr) -> Runs:
        """The runs that serve every row of the batch."""
        if not (mask.mentions(b) or self.position.mentions(b)):
            return self._row(mask, self.position)
        rows = [{b: const(n)} for n in range(self._batch(mask))]
        return joined([self._row(mask.substitute(row), self.position.substitute(row)) for row in rows])

    def _batch(self, mask: Expr) -> int:
        """The length of the axis that tables read at `b`."""
        sizes = [1]
        for node in {*mask.walk(), *self.position.walk()}:
            if node.op == "table" and node.value in self.tables and b in node.args:
                shape = self.tables[str(node.value)].values.shape
                axis = len(shape) - len(node.args) + node.args.index(b)
                sizes += [shape[axis]] if axis >= 0 else []
        return max(sizes)

    def _row(self, mask: Expr, position: Expr) -> Runs:
        key_order = None if self.order is None else np.asarray(self.order, np.int64)
        query_order = self._query_order(key_order, position)
        return visits(mask, self.q_len, self.k_len, self.tile, position, query_order, key_order, self.tables)

    def _query_order(self, key_order: Integers | None, position: Expr) -> Integers | None:
        if key_order is None:
            return None
        if sorted(key_order.tolist()) != list(range(self.k_len)):
            raise ShapeError(f"an order lists every position from 0 to {self.k_len - 1} once")
        rank = np.argsort(key_order)
        at = Tokens(self.q_len, 1, i, None, {q: position}, self.tables).values(q, 0, self.q_len).lo
        return np.argsort(rank[np.clip(at, 0, self.k_len - 1).astype(np.int64)], kind="stable")
