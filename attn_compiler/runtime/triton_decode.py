"""Runs the Triton kernels for few queries: nothing depends on lengths or positions but the number of slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from attn_compiler.algebra.expr import Expr
from attn_compiler.algebra.variant import EmptyRows, Variant
from attn_compiler.runtime.kernels import Shape, spec_at
from attn_compiler.runtime.triton_kernels import Blocks, call, load, on_device, operand, table
from attn_compiler.targets.cpp.decode import FAR, distances
from attn_compiler.targets.cpp.spec import Spec
from attn_compiler.targets.operands import head_groups
from attn_compiler.targets.reach import shows_itself
from attn_compiler.targets.triton.decode import decoding, merging
from attn_compiler.targets.triton.source import NARROWEST

MOST_ROWS = 64  # queries of all heads in one tile
LEAST_TILES = 2  # of keys, that a slice is worth
PROCESSORS = 8  # of a device that does not say
WAVES = 2  # slices for each multiprocessor
PARTS = 32  # slices that are merged at once


@dataclass(frozen=True)
class Launch:
    """The kernels for some of the heads, and what they have to know of them."""

    members: tuple[int, ...]
    ratio: int  # query heads that share a key head
    spec: Spec
    mask: Expr  # in positions
    counted: bool  # whether positions are
    reach: tuple[int, int, int]
    numbers: tuple[int, ...]  # the places of its tables among those of the call

    @property
    def fills(self) -> bool:
        """Whether a query that sees no key gets something of all keys."""
        return self.spec.variant.empty_rows in (EmptyRows.MEAN, EmptyRows.UNMASKED)


def launches(shape: Shape) -> tuple[Launch, ...]:
    """The launches of all calls that differ from `shape` in lengths and positions only."""
    return tuple(_launch(shape, members, variant) for members, variant in head_groups(shape.variant, shape.heads))


def _launch(shape: Shape, members: tuple[int, ...], variant: Variant) -> Launch:
    spec = spec_at(shape, variant)
    reach = distances(variant.mask) if shape.k_counted else (-FAR, FAR, 0)
    numbers = tuple(shape.names.index(name) for name, _ in spec.tables)
    counted = shape.q_counted and shape.k_counted
    return Launch(members, shape.heads // shape.kv_heads, spec, variant.mask, counted, reach, numbers)


def run(
    launched: Sequence[Launch],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    totals: Tensor | None,
    tables: Sequence[Tensor],
    layer: tuple[int, int],
    first: Sequence[int],
) -> None:
    """Fill `out` and `totals`; `layer` is its number, and that of all layers."""
    sizes = (q.shape[1], k.shape[1], q.shape[2], k.shape[2], *layer, *first)
    for one in launched:
        _run(one, q, k, v, out, totals, tuple(table(tables[n]) for n in one.numbers), sizes)


def _run(
    one: Launch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    totals: Tensor | None,
    tables: tuple[object, ...],
    sizes: tuple[int, ...],
) -> None:
    batch, heads, q_len, k_len, first = q.shape[0], sizes[0], sizes[2], sizes[3], sizes[6:]
    groups = groups_of(one, q_len)
    blocks = blocks_of(one.spec, groups.most * q_len)
    count = slices(one.reach, q_len, k_len, blocks.keys, batch * groups.count, q.device)
    fills = one.fills and not _all_see(one, q_len, k_len, first)
    parts = count * (1 + fills)
    peaks, masses = (q.new_empty((parts, batch, heads, q_len), dtype=torch.float32) for _ in range(2))
    sums = q.new_empty((parts, batch, heads, q_len, v.shape[3]), dtype=torch.float32)
    members, starts, owners = _on(groups, q.device)
    given = (*map(operand, (q, k, v)), sums, peaks, masses, members, starts, owners, tables, *sizes)
    for_slices, merge, *rest = map(load, sources(one, everything=fills))
    for module in (for_slices, *rest):
        call(q, module.decode, (count, groups.count, batch), given, blocks.options())
    given = (sums, peaks, masses, operand(out), totals, members, tables, *sizes, parts)
    call(q, merge.merge, (q_len, len(one.members), batch), given, {"PARTS": PARTS, "num_warps": 4})


def sources(one: Launch, *, everything: bool) -> tuple[str, ...]:
    """The kernel for slices, the one that merges, and perhaps that for queries that see no key and meet everything."""
    rest = (decoding(one.spec, one.reach, every=True),) if everything else ()
    return decoding(one.spec, one.reach), merging(one.spec), *rest


def blocks_of(spec: Spec, queries: int) -> Blocks:
    """How the kernel for slices is cut, where so many queries share their keys."""
    rows = max(NARROWEST, 1 << (queries - 1).bit_length())
    return Blocks(rows, 32 if spec.dtype == "float32" else 64, 4, 3)


def slices(reach: tuple[int, int, int], q_len: int, k_len: int, block: int, programs: int, device: torch.device) -> int:
    """How many slices the keys are cut into: enough to keep a device busy, none without work."""
    nearest, farthest, first = reach
    likely = min(k_len, first + max(0, farthest - nearest) + q_len)  # kernels cut what is really there
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS
    return max(1, min(-(-likely // (LEAST_TILES * block)), -(-WAVES * processors // programs)))


def _all_see(one: Launch, q_len: int, k_len: int, first: Sequence[int]) -> bool:
    """Whether each query sees the key at its own position, and there is one."""
    place = first[0] - first[1]
    return one.counted and place >= 0 and place + q_len <= k_len and _shows_itself(one.mask)


_shows_itself = lru_cache(maxsize=256)(shows_itself)


@dataclass(frozen=True)
class Groups:
    """Heads that share their keys, as many as fit into a tile: the heads, where each group starts, and whose keys they are."""

    numbers: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

    @property
    def count(self) -> int:
        return len(self.numbers[2])

    @property
    def most(self) -> int:
        """The heads of the largest group."""
        return max(b - a for a, b in pairwise(self.numbers[1]))


def groups_of(one: Launch, q_len: int) -> Groups:
    """The groups of a launch for so many queries."""
    return _groups(one.members, one.ratio, max(1, MOST_ROWS // q_len))


@lru_cache(maxsize=128)
def _groups(members: tuple[int, ...], ratio: int, most: int) -> Groups:
    starts = [0]
    for n, head in enumerate(members):
        if head // ratio != members[starts[-1]] // ratio or n == starts[-1] + most:
            starts.append(n)
    return Groups((members, (*starts, len(members)), tuple(members[n] // ratio for n in starts)))


@lru_cache(maxsize=128)
def _on(groups: Groups, device: torch.device) -> tuple[Tensor, ...]:
    return on_device(map(np.array, groups.numbers), device)
