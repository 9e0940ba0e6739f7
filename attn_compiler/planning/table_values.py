"""The real values of a run-time table, and their extremes over boxes of its coordinates."""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attn_compiler.planning.extents import Extent, Values


class TableValues:
    """Extremes over runs of 1, 2, 4 … entries of each axis, built when first asked for; any run is two of those."""

    def __init__(self, values: ArrayLike) -> None:
        self.values: NDArray[np.float64] = np.asarray(values).astype(np.float64)
        self._extremes: dict[tuple[int, ...], tuple[Values, Values]] = {}

    def extent(self, at: tuple[Extent, ...]) -> Extent:
        """Bound the entries in a box; a table with fewer axes is read at the last coordinates, borders are repeated."""
        axes = self.values.ndim
        if axes == 0:
            return Extent.point(self.values)
        used = at[len(at) - axes :]
        lows = [_index(a.lo, size) for a, size in zip(used, self.values.shape, strict=True)]
        if all(a.is_point for a in used):
            return Extent.point(self.values[tuple(lows)])
        highs = [_index(a.hi, size) for a, size in zip(used, self.values.shape, strict=True)]
        ends = np.broadcast_arrays(*lows, *highs)
        low, high = (np.stack([x.ravel() for x in part]) for part in (ends[:axes], ends[axes:]))
        smallest, largest = self._over(low, high)
        return Extent(smallest.reshape(ends[0].shape), largest.reshape(ends[0].shape))

    def _over(self, low: NDArray[np.int64], high: NDArray[np.int64]) -> tuple[Values, Values]:
        levels = np.frexp(high - low + 1)[1] - 1
        smallest, largest = np.empty(low.shape[1]), np.empty(low.shape[1])
        for level in np.unique(levels, axis=1).T:
            here = (levels == level[:, None]).all(axis=0)
            reduced = self._reduced(tuple(int(x) for x in level))
            ends = [(lo[here], hi[here] - (1 << int(x)) + 1) for lo, hi, x in zip(low, high, level, strict=True)]
            corners = list(product(*ends))
            smallest[here] = np.min([reduced[0][corner] for corner in corners], axis=0)
            largest[here] = np.max([reduced[1][corner] for corner in corners], axis=0)
        return smallest, largest

    def _reduced(self, level: tuple[int, ...]) -> tuple[Values, Values]:
        if level not in self._extremes:
            axis = next((n for n, x in enumerate(level) if x), None)
            if axis is None:
                self._extremes[level] = (self.values, self.values)
            else:
                below = self._reduced(tuple(x - (n == axis) for n, x in enumerate(level)))
                shift = 1 << (level[axis] - 1)
                first, second = _ahead(axis, None, -shift), _ahead(axis, shift, None)
                self._extremes[level] = (
                    np.minimum(below[0][first], below[0][second]),
                    np.maximum(below[1][first], below[1][second]),
                )
        return self._extremes[level]


def _index(x: Values, size: int) -> NDArray[np.int64]:
    return np.clip(x, 0, size - 1).astype(np.int64)


def _ahead(axis: int, start: int | None, stop: int | None) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, slice(start, stop))
