"""Which key tiles each query tile visits: a few runs of neighboring tiles per query tile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attn_compiler.algebra.bounds import Occupancy

Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Segments:
    """Runs `start … stop` of key tiles in the query tile `row`, in any order."""

    row: Integers
    start: Integers
    stop: Integers


@dataclass(frozen=True, eq=False)
class Runs:
    """Row `r` owns the runs `offsets[r]` to `offsets[r + 1]`, in order; what no run holds is empty."""

    rows: int
    columns: int
    offsets: Integers
    start: Integers
    stop: Integers
    full: NDArray[np.bool_]

    def row(self, r: int) -> tuple[tuple[int, int, Occupancy], ...]:
        """The runs of one row."""
        mine = slice(int(self.offsets[r]), int(self.offsets[r + 1]))
        occupancy = (Occupancy.FULL if full else Occupancy.MIXED for full in self.full[mine])
        return tuple(zip(self.start[mine].tolist(), self.stop[mine].tolist(), occupancy, strict=True))

    def tiles(self) -> Iterator[tuple[int, int, Occupancy]]:
        """Every visited tile as (row, column, occupancy)."""
        for r in range(self.rows):
            for start, stop, occupancy in self.row(r):
                yield from ((r, column, occupancy) for column in range(start, stop))

    @property
    def row_of_run(self) -> Integers:
        return np.repeat(np.arange(self.rows), np.diff(self.offsets))

    def count(self, full: bool | None = None) -> int:
        """How many tiles are visited; with `full`, how many of them are full, or mixed."""
        wanted = slice(None) if full is None else self.full == full
        return int((self.stop - self.start)[wanted].sum())

    def key(self) -> bytes:
        """Equal for equal runs."""
        return b"|".join(part.tobytes() for part in (self.offsets, self.start, self.stop, self.full))

    def segments(self, full: bool) -> Segments:
        """All runs; with `full`, the full ones only."""
        wanted = self.full if full else np.ones(len(self.full), bool)
        return Segments(self.row_of_run[wanted], self.start[wanted], self.stop[wanted])


def sweep(rows: int, columns: int, visited: Sequence[Segments], full: Sequence[Segments], lanes: int = 1) -> Runs:
    """Walk along each row and merge: visited where any segment is, full where at least `lanes` of `full` overlap."""
    width = columns + 1
    places, steps = [], []
    for kind, segments in enumerate((visited, full)):
        for part in segments:
            here = part.stop > part.start
            for end, step in ((part.start, 1), (part.stop, -1)):
                places.append((part.row * width + end)[here])
                change = np.zeros((int(here.sum()), 2), np.int64)
                change[:, kind] = step
                steps.append(change)
    place = np.concatenate(places) if places else np.zeros(0, np.int64)
    change = np.concatenate(steps) if steps else np.zeros((0, 2), np.int64)
    order = np.argsort(place, kind="stable")
    place, depth = place[order], np.cumsum(change[order], axis=0)
    last = np.append(place[1:] != place[:-1], True)[: len(place)]
    place, depth = place[last], depth[last]
    state = np.where(depth[:, 1] >= lanes, 2, (depth > 0).any(axis=1).astype(np.int64))
    changes = np.append(True, state[1:] != state[:-1])[: len(state)]
    place, state = place[changes], state[changes]
    seen = np.flatnonzero(state > 0)
    begin, end = place[seen], place[seen + 1] if len(seen) else place[:0]
    row = begin // width
    offsets = np.searchsorted(row, np.arange(rows + 1))
    return Runs(rows, columns, offsets, begin - row * width, end - row * width, state[seen] == 2)


def joined(lanes: Sequence[Runs]) -> Runs:
    """One schedule that serves all lanes: a tile is full only where it is full in each."""
    if len(lanes) == 1:
        return lanes[0]
    visited, full = ([lane.segments(only) for lane in lanes] for only in (False, True))
    return sweep(lanes[0].rows, lanes[0].columns, visited, full, len(lanes))
