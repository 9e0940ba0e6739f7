"""Checks a schedule against the dense mask: no visible pair is lost, no tile is called full that is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attn_compiler.algebra.expr import Sort
from attn_compiler.planning.schedule import Schedule, schedule
from attn_compiler.runtime.call import operands_of
from attn_compiler.targets.arrangement import whole
from attn_compiler.targets.operands import head_groups
from attn_compiler.targets.torch_target import visible_keys
from attn_compiler.testing.case import Case

TILE = (8, 4)


def assert_tiles(case: Case) -> None:
    """Check the tiles of every head, with the tables' values and without."""
    visible = dense_mask(case)
    _, heads, q_len, k_len = visible.shape
    values = {name: table.detach().cpu().numpy() for name, table in case.tables.items()}
    for tables, where in ((values, "with its tables"), ({}, "without its tables")):
        found = schedule(case.variant, q_len, k_len, tile=TILE, heads=heads, kv_heads=case.k.shape[1], tables=tables)
        for head in range(heads):
            _assert_head(found, head, visible[:, head].numpy(), f"the schedule {where}, {q_len} x {k_len}, head {head}")


def dense_mask(case: Case) -> Tensor:
    """Which keys each query sees, as [batch, heads, queries, keys]; the last query meets the last key."""
    operands = operands_of(case.q, case.k, case.v, case.variant, case.tables, None, None, 0, 1, False)
    seen = torch.empty(*case.q.shape[:3], case.k.shape[2], dtype=torch.bool)
    for members, of_group in head_groups(case.variant, operands.heads):
        arrangement = whole(operands.take(members), torch.float64)
        alone = replace(of_group, groups=())
        seen[:, list(members)] = arrangement.arrays.tensor(visible_keys(arrangement, alone), Sort.BOOL)
    return seen


def _assert_head(found: Schedule, head: int, visible: NDArray[np.bool_], where: str) -> None:
    visited, full = np.zeros(visible.shape[1:], bool), np.zeros(visible.shape[1:], bool)
    for row, column, occupancy in found.tiles(head):
        at = np.s_[row * TILE[0] : (row + 1) * TILE[0], column * TILE[1] : (column + 1) * TILE[1]]
        visited[at], full[at] = True, occupancy.value == "full"
    lost = "is visible, and its tile is not visited"
    for pairs, wrong in ((visible & ~visited, lost), (~visible & full, "is hidden, and its tile is called full")):
        if pairs.any():
            _, query, key = np.argwhere(pairs)[0]
            raise AssertionError(f"{where}: query {query}, key {key} {wrong}")
