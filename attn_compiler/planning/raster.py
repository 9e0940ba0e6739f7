"""A schedule as a small picture of cells, however many tiles it has."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from attn_compiler.planning.runs import Runs

EMPTY, MIXED, FULL = range(3)
_SIGNS = np.array(["·", "▒", "█"])


def raster(runs: Runs, height: int, width: int) -> NDArray[np.int64]:
    """Paint at most `height` x `width` cells: empty or full where all their tiles are, else mixed."""
    height, width = min(height, runs.rows), min(width, runs.columns)
    if not (height and width):
        return np.zeros((height, width), np.int64)
    cell = runs.row_of_run * height // runs.rows
    first, last = runs.start * width, runs.stop * width
    touched = _depth(cell, first // runs.columns, -(-last // runs.columns), height, width)
    inner = (-(-first // runs.columns), last // runs.columns)
    covered = _depth(cell[runs.full], inner[0][runs.full], inner[1][runs.full], height, width)
    rows = np.bincount(np.arange(runs.rows) * height // runs.rows, minlength=height)
    return np.where(covered >= rows[:, None], FULL, np.where(touched > 0, MIXED, EMPTY))


def _depth(
    row: NDArray[np.int64], start: NDArray[np.int64], stop: NDArray[np.int64], height: int, width: int
) -> NDArray[np.int64]:
    """How many of the runs lie over each cell."""
    steps = np.zeros((height, width + 1), np.int64)
    here = stop > start
    np.add.at(steps, (row[here], start[here]), 1)
    np.add.at(steps, (row[here], stop[here]), -1)
    return steps.cumsum(axis=1)[:, :width]


def sketch(runs: Runs, width: int = 64) -> str:
    """Draw with characters: a line per row of cells, `·` empty, `▒` mixed, `█` full."""
    wide = min(width // 2, runs.columns)
    return "\n".join("".join(sign * 2 for sign in line) for line in _SIGNS[raster(runs, wide, wide)])
