"""What an attention costs: arithmetic and memory traffic, dense and as scheduled."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attn_compiler.errors import ShapeError

if TYPE_CHECKING:
    from attn_compiler.planning.schedule import Schedule


@dataclass(frozen=True)
class Cost:
    """Of one forward pass. A kernel reads the keys and values of every tile it visits, queries once, and writes once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Saving:
    """The same attention, visiting all tiles and visiting those of the schedule."""

    dense: Cost
    scheduled: Cost

    @property
    def flops_ratio(self) -> float:
        """How many times less arithmetic the schedule needs."""
        return self.dense.flops / self.scheduled.flops if self.scheduled.flops else float("inf")


def saving(schedule: Schedule, heads: int, head_dim: int, value_dim: int, dtype: str) -> Saving:
    """Count what `heads` heads like those of the schedule cost."""
    q_tiles = -(-schedule.q_len // schedule.tile[0])
    all_pairs, all_reads = schedule.q_len * schedule.k_len, q_tiles * schedule.k_len
    pairs, reads = (count * heads // schedule.heads for count in (schedule.visited_pairs, schedule.visited_keys))
    once, width = heads * schedule.q_len * (head_dim + value_dim), head_dim + value_dim

    def cost(computed: int, read: int) -> Cost:
        return Cost(flops=2 * computed * width, bytes=(once + read * width) * bits_of(dtype) // 8)

    return Saving(cost(heads * all_pairs, heads * all_reads), cost(pairs, reads))


def summed(q_len: int, k_len: int, heads: int, features: int, head_dim: int, value_dim: int, dtype: str) -> Cost:
    """What linear attention costs: a key's features times its value are added up, and a query's meet the sum."""
    numbers = heads * (q_len + k_len) * (head_dim + value_dim)
    return Cost(flops=2 * heads * (q_len + k_len) * features * value_dim, bytes=numbers * bits_of(dtype) // 8)


def solved(pairs: int, queries: int, heads: int, dim: int) -> int:
    """What regressions cost beside attention: dim x dim numbers of each pair, and a system of equations of each query."""
    return heads * (2 * pairs * dim * (dim + 2) + queries * 2 * dim**3 // 3)


def bits_of(dtype: str) -> int:
    """How many bits a number of this type takes."""
    found = re.search(r"\d+", dtype)
    if found is None:
        raise ShapeError(f'a dtype is named with its bits, like "float32" or "bfloat16", not "{dtype}"')
    return int(found[0])
