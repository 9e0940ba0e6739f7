"""Tiles of any mask by refinement: boxes of tiles are split until they are empty, full, or a single mixed tile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attn_compiler.algebra.expr import Expr, rebuild, symbol
from attn_compiler.planning.atoms import Alone, Any, Atom, Below, Both, Formula, Opaque, Side, side
from attn_compiler.planning.extents import Extent, Tables, extent
from attn_compiler.planning.runs import Integers, Runs, Segments, sweep
from attn_compiler.planning.tokens import Tokens

_MOST_BOXES = 1 << 22

Truth = NDArray[np.bool_]


@dataclass(frozen=True)
class Boxes:
    """Boxes of 2 ** level query tiles times 2 ** level key tiles."""

    level: int
    row: Integers
    column: Integers

    def where(self, wanted: Truth) -> Boxes:
        return Boxes(self.level, self.row[wanted], self.column[wanted])

    def split(self, rows: int, columns: int) -> Boxes:
        """Four quarters of each, without those that lie outside."""
        level, quarters = self.level - 1, np.arange(4)
        row = (2 * self.row[:, None] + quarters // 2).ravel()
        column = (2 * self.column[:, None] + quarters % 2).ravel()
        inside = (row << level < rows) & (column << level < columns)
        return Boxes(level, row[inside], column[inside])

    def segments(self, rows: int, columns: int) -> Segments:
        """One segment per query tile."""
        size = 1 << self.level
        row = ((self.row << self.level)[:, None] + np.arange(size)).ravel()
        start = np.repeat(self.column << self.level, size)
        inside = row < rows
        return Segments(row[inside], start[inside], np.minimum(start[inside] + size, columns))


@dataclass(frozen=True)
class Analysis:
    """The mask over boxes."""

    mask: Formula
    queries: Tokens
    keys: Tokens
    tables: Tables

    def truth(self, boxes: Boxes, guess: bool) -> tuple[Truth, Truth]:
        """Whether the mask holds everywhere and somewhere, where comparisons nobody can decide are `guess`."""
        return self._formula(self.mask, boxes, guess)

    def _formula(self, part: Formula, boxes: Boxes, guess: bool) -> tuple[Truth, Truth]:
        if not isinstance(part, Both | Any):
            lo, hi = self._atom(part, boxes, guess)
            return np.broadcast_to(lo, boxes.row.shape), np.broadcast_to(hi, boxes.row.shape)
        join = np.logical_and if isinstance(part, Both) else np.logical_or
        everywhere, somewhere = self._formula(part.parts[0], boxes, guess)
        for other in part.parts[1:]:
            more = self._formula(other, boxes, guess)
            everywhere, somewhere = join(everywhere, more[0]), join(somewhere, more[1])
        return everywhere, somewhere

    def _atom(self, atom: Atom, boxes: Boxes, guess: bool) -> tuple[Truth, Truth]:
        if self.undecided(atom):
            return np.array(guess), np.array(guess)
        match atom:
            case Below(key, query, strict):
                low, high = self._over(Side.KEY, key, boxes), self._over(Side.QUERY, query, boxes)
                less = np.less if strict else np.less_equal
                return less(low.hi, high.lo), less(low.lo, high.hi)
            case Alone(condition, speaks):
                found = self._over(speaks, condition, boxes)
            case Opaque(condition):
                leaves: dict[Expr, Extent] = {}
                found = extent(self._projected(condition, boxes, leaves), leaves, self.tables)
        return found.lo.astype(bool), found.hi.astype(bool)

    def undecided(self, atom: Atom) -> bool:
        """Whether it reads a table whose values nobody knows."""
        read = (atom.key, atom.query) if isinstance(atom, Below) else (atom.condition,)
        return any(e.tables() - self.tables.keys() for e in read)

    def _over(self, speaks: Side, e: Expr, boxes: Boxes) -> Extent:
        tokens, at = (self.keys, boxes.column) if speaks is Side.KEY else (self.queries, boxes.row)
        found = tokens.extremes(e, boxes.level)
        return Extent(found.lo[at], found.hi[at])

    def _projected(self, e: Expr, boxes: Boxes, leaves: dict[Expr, Extent]) -> Expr:
        """Put a leaf in the place of every part that speaks of one token: its extremes are known exactly."""
        spoken = side(e)
        if spoken is Side.BOTH:
            return rebuild(e, tuple(self._projected(a, boxes, leaves) for a in e.args))
        if spoken is Side.NEITHER:
            return e
        leaf = symbol(f"known: {e!r}", e.sort)  # equal parts stay equal
        leaves[leaf] = self._over(spoken, e, boxes)
        return leaf


def refine(analysis: Analysis, open_atoms: bool) -> Runs:
    """The runs of any mask, at a cost proportional to its mixed boxes."""
    rows, columns = analysis.queries.tiles, analysis.keys.tiles
    visited: list[Segments] = []
    full: list[Segments] = []
    top = max(rows, columns, 1).bit_length()
    boxes = Boxes(top, *(np.zeros(min(rows, columns, 1), np.int64) for _ in "qk"))
    while len(boxes.row):
        everywhere, somewhere = analysis.truth(boxes, guess=True)
        certain = analysis.truth(boxes, guess=False) if open_atoms else (everywhere, somewhere)
        full.append(boxes.where(certain[0]).segments(rows, columns))
        # What a table alone decides stays mixed however small the box.
        stays = everywhere & ~certain[1]
        mixed = somewhere & ~certain[0] & ~stays
        done = boxes.level == 0 or 4 * int(mixed.sum()) > _MOST_BOXES
        visited.append(boxes.where(stays | mixed if done else stays).segments(rows, columns))
        if done:
            break
        boxes = boxes.where(mixed).split(rows, columns)
    return sweep(rows, columns, visited, full)
