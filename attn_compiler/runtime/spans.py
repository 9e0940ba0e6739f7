"""Neighboring tiles that are visited, with those in their midst that hide nothing: what can be cut at both ends as one."""

from __future__ import annotations

import numpy as np

from attn_compiler.planning.runs import Integers, Runs


def spans(runs: Runs) -> Integers:
    """[tiles, spans, 4]: where neighbors start, where those among them start and stop that hide nothing, where all stop."""
    row, full = runs.row_of_run, runs.full
    apart = np.ones(len(row), bool)
    apart[1:] = (row[1:] != row[:-1]) | (runs.start[1:] != runs.stop[:-1])
    before: Integers = np.cumsum(full) - full
    cores = before - np.maximum.accumulate(np.where(apart, before, 0))  # of the neighbors so far
    begins = apart | (full & (cores > 0))
    number = np.cumsum(begins) - 1
    first = np.flatnonzero(begins)
    last = np.append(first[1:], len(row))[: len(first)] - 1
    found = np.stack([runs.start[first], *2 * [runs.stop[last]], runs.stop[last]], axis=1)
    found[number[full], 1:3] = np.stack([runs.start[full], runs.stop[full]], axis=1)
    place = np.arange(len(first)) - np.searchsorted(row[first], row[first])
    result = np.full((runs.rows, max(1, int(place.max(initial=0)) + 1), 4), -1, np.int64)
    result[row[first], place] = found
    return filled(result, result.shape[1])


def filled(found: Integers, most: int) -> Integers:
    """The same with so many spans; those that are left over are empty, and stand where the one before stops."""
    found = np.concatenate([found, np.full((len(found), most - found.shape[1], 4), -1, np.int64)], axis=1)
    before = np.zeros((len(found), 1), np.int64)
    for n in range(most):
        found[:, n] = np.where(found[:, n] < 0, before, found[:, n])
        before = found[:, n, 3:]
    return found
