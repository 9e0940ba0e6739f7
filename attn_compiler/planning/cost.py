"""What an attention costs: arithmetic and memory traffic, dense and as scheduled."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from attn_compiler.algebra.context import Context, Merge
from attn_compiler.errors import ShapeError

if TYPE_CHECKING:
    from attn_compiler.planning.schedule import Schedule
    from attn_compiler.planning.site import Site


@dataclass(frozen=True)
class Cost:
    """Of one forward pass. A kernel reads the keys and values of every tile it visits, queries once, and writes once."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Around:
    """A site as whoever attends there meets it, and what is computed around that."""

    site: Site
    cost: Cost


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


def pooled(one: Context, site: Site) -> Around:
    """What means of neighbors, or agents that gather all values first, leave of a site."""
    if one.how == "extra":
        return Around(site, Cost(0, 0))
    lengths = one.grid or (site.k_hint,)
    if one.how == "pool":
        count = math.prod(-(-length // size) for length, size in zip(lengths, one.sizes, strict=True))
        return Around(replace(site, k_hint=count), Cost(0, 0))
    count = math.prod(one.sizes)
    return Around(replace(site, k_hint=count), _gathering(site, count, written=2))


def merged(one: Merge, site: Site) -> Around:
    """What merging leaves of a site: every token is compared with those that wait, and averages are made and handed back."""
    tokens, left = site.k_hint, one.left(one.share)
    width = (site.input_width if one.metric else 0) or site.head_dim
    likeness = Cost(2 * tokens * one.waiting * width, (tokens * width + 2 * tokens * one.waiting) * bits_of(site.dtype) // 8)
    moved = site.heads * (tokens + left) * (2 * site.head_dim + 2 * site.value_dim) * bits_of(site.dtype) // 8
    fewer, cost = replace(site, q_hint=left, k_hint=left), Cost(likeness.flops, likeness.bytes + moved)
    if one.agents is None:
        return Around(fewer, cost)
    agents = one.left(one.agents)
    return Around(replace(fewer, k_hint=agents), cost + _gathering(fewer, agents))


def _gathering(site: Site, agents: int, written: int = 0) -> Cost:
    """What it costs that so many agents attend to all keys; weights that are written out are moved so often."""
    width, pairs = site.head_dim + site.value_dim, agents * site.k_hint
    numbers = site.heads * ((agents + site.k_hint) * width + written * pairs)
    return Cost(2 * site.heads * pairs * width, numbers * bits_of(site.dtype) // 8)


def solved(pairs: int, queries: int, heads: int, dim: int) -> int:
    """What regressions cost beside attention: dim x dim numbers of each pair, and a system of equations of each query."""
    return heads * (2 * pairs * dim * (dim + 2) + queries * 2 * dim**3 // 3)


def bits_of(dtype: str) -> int:
    """How many bits a number of this type takes."""
    found = re.search(r"\d+", dtype)
    if found is None:
        raise ShapeError(f'a dtype is named with its bits, like "float32" or "bfloat16", not "{dtype}"')
    return int(found[0])
