"""Runs the Triton kernels for few queries: nothing depends on lengths or positions but the number of slices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.boolean import conjunction
from attn_compiler.algebra.expr import Expr
from attn_compiler.algebra.simplify import conjuncts
from attn_compiler.algebra.variant import EmptyRows
from attn_compiler.runtime.kernels import Shape, spec_of_few
from attn_compiler.runtime.triton_launch import call, in_words, load, on_device, operand, table
from attn_compiler.runtime.triton_launch import sizes as sizes_of
from attn_compiler.runtime.triton_visits import WARPS
from attn_compiler.runtime.tuning import chosen, example
from attn_compiler.targets.cpp.decode import MOST_QUERIES, reach_of
from attn_compiler.targets.cpp.spec import LONGEST, Spec
from attn_compiler.targets.operands import head_groups
from attn_compiler.targets.reach import shows_itself
from attn_compiler.targets.rows import encoded
from attn_compiler.targets.triton.blocks import Blocks
from attn_compiler.targets.triton.clip import TILES, clipping, divided
from attn_compiler.targets.triton.decode import decoding, merging
from attn_compiler.targets.triton.source import NARROWEST

MOST_ROWS = 64  # queries of all heads in one tile
LEAST_TILES = 2  # of keys, that a slice is worth
PROCESSORS = 8  # of a device that does not say
WAVES = 2  # slices for each multiprocessor
TRIED = 1 << 13  # keys with which cuts are compared
LONG = 1 << 12  # keys from which on it pays to ask tables first which of them are seen
PARTS = 32  # slices that are merged at once


@dataclass(frozen=True)
class Launch:
    """The kernels for some of the heads, and what they have to know of them."""

    shape: Shape  # of the calls, but for lengths and positions
    group: int  # which of its groups of heads
    members: tuple[int, ...]
    spec: Spec
    mask: Expr  # in positions
    reach: tuple[int, int, int]
    shown: Expr  # what only tables tell, of all heads
    numbers: tuple[int, ...]  # the places of its tables among those of the call

    @property
    def fills(self) -> bool:
        """Whether a query that sees no key gets something of all keys."""
        return self.spec.variant.empty_rows in (EmptyRows.MEAN, EmptyRows.UNMASKED)


def launches(shape: Shape) -> tuple[Launch, ...]:
    """The launches of all calls that differ from `shape` in lengths and positions only."""
    return tuple(_launch(shape, group) for group in range(len(head_groups(shape.variant, shape.heads))))


def _launch(shape: Shape, group: int) -> Launch:
    members, variant = head_groups(shape.variant, shape.heads)[group]
    spec = spec_of_few(shape, variant)
    reach = reach_of(variant.mask, k_counted=shape.k_counted)
    _, shown = divided(spec.variant.mask, spec.variant.mask.tables())
    shown = conjunction([part for part in conjuncts(shown) if not part.mentions(e.h, e.kv)], {})
    return Launch(
        shape, group, members, spec, variant.mask, reach, shown, tuple(shape.names.index(name) for name, _ in spec.tables)
    )


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
    k, v = in_words(k), in_words(v)
    for one in launched:
        _run(one, blocks_of(one, q.shape[2], q.device), (q, k, v, out), totals, tables, sizes)


def _run(
    one: Launch,
    blocks: Blocks,
    operands: Sequence[Tensor],
    totals: Tensor | None,
    tables: Sequence[Tensor],
    sizes: tuple[int, ...],
) -> None:
    q, *_, out = operands
    batch, heads, q_len, k_len, first = q.shape[0], sizes[0], sizes[2], sizes[3], sizes[6:]
    groups = groups_of(one, q_len)
    count = slices(one.reach, q_len, k_len, blocks.keys, batch * groups.count, q.device)
    fills = one.fills and not _all_see(one, q_len, k_len, first)
    parts = count * (1 + fills)
    peaks, masses = (q.new_empty((parts, batch, heads, q_len), dtype=torch.float32) for _ in range(2))
    sums = q.new_empty((parts, batch, heads, q_len, out.shape[3]), dtype=torch.float32)
    members, starts, owners = _on(groups, q.device)
    read = tuple(table(tables[n]) for n in one.numbers)
    limits = None if k_len < LONG else _limits(one, blocks, q, read, sizes)
    given = (*map(operand, operands[:3]), sums, peaks, masses, members, starts, owners, limits, read, *sizes)
    for_slices, merge, *rest = map(load, sources(one, everything=fills))
    for module in (for_slices, *rest):
        call(q, module.decode, (count, groups.count, batch), given, blocks.options())
    given = (sums, peaks, masses, operand(out), totals, members, read, *sizes, parts)
    call(q, merge.merge, (q_len, len(one.members), batch), given, {"PARTS": PARTS, "num_warps": 4})


def _limits(one: Launch, blocks: Blocks, q: Tensor, read: object, sizes: tuple[int, ...]) -> Tensor | None:
    """Between which tiles of keys all stand that tables show to some query, in each row of the batch: two numbers of eight."""
    if one.shown == e.true:
        return None
    span, *tasks = _in_each_row(q.shape[0], q.device)
    clipped, orders = span.new_empty((q.shape[0], 8)), (None, None)
    options = {**replace(blocks, queries=MOST_QUERIES).sizes(), "SPANS": 1, "TILES": TILES, "num_warps": WARPS}
    kernel = load(clipping(one.spec, one.shown)).clip
    call(q, kernel, (1, q.shape[0]), (span, clipped, tuple(tasks), orders, read, *sizes), options)
    return clipped


@lru_cache(maxsize=128)
def _in_each_row(batch: int, device: torch.device) -> tuple[Tensor, ...]:
    """All tiles of keys, none of which goes without a mask, and a task for each row: any head, the row, the only schedule."""
    span, nothing = np.array([0, LONGEST, LONGEST, LONGEST]), np.zeros(batch, np.int64)
    return on_device((span, nothing, np.arange(batch), nothing), device)


def sources(one: Launch, *, everything: bool) -> tuple[str, ...]:
    """The kernel for slices, the one that merges, and perhaps that for queries that see no key and meet everything."""
    rest = (decoding(one.spec, one.reach, every=True),) if everything else ()
    return decoding(one.spec, one.reach), merging(one.spec), *rest


@lru_cache(maxsize=128)
def blocks_of(one: Launch, q_len: int, device: torch.device) -> Blocks:
    """How the kernel for slices is cut for so many queries."""
    rows = rows_of(one, q_len)
    blocks = chosen("decode", one.shape, one.group, device, partial(_attempt, one, q_len, device), queries=rows)
    return replace(blocks, queries=rows)


def rows_of(one: Launch, q_len: int) -> int:
    """The rows of a tile that holds the queries of all heads that share their keys."""
    return max(NARROWEST, 1 << (groups_of(one, q_len).most * q_len - 1).bit_length())


def _attempt(one: Launch, q_len: int, device: torch.device, blocks: Blocks) -> Callable[[], None]:
    """Launch the kernels on numbers of their own."""
    shape = replace(one.shape, batch=1, q_len=q_len, k_len=TRIED, first_query=TRIED - q_len)
    q, k, v, out, tables = example(shape, device)
    held = head_groups(shape.variant, shape.heads)[one.group][1].storage.kv_cache
    k, v = (x if held is None else encoded(x, held.of(n)) for n, x in enumerate((k, v)))
    return lambda: _run(one, blocks, (q, k, v, out), None, tables, sizes_of(shape))


def slices(reach: tuple[int, int, int], q_len: int, k_len: int, block: int, programs: int, device: torch.device) -> int:
    """How many slices the keys are cut into: enough to keep a device busy, none without work."""
    nearest, farthest, first = reach
    likely = min(k_len, first + max(0, farthest - nearest) + q_len)  # kernels cut what is really there
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS
    return max(1, min(-(-likely // (LEAST_TILES * block)), -(-WAVES * processors // programs)))


def _all_see(one: Launch, q_len: int, k_len: int, first: Sequence[int]) -> bool:
    """Whether each query sees the key at its own position, and there is one."""
    place = first[0] - first[1]
    return one.shape.q_counted and one.shape.k_counted and place >= 0 and place + q_len <= k_len and _shows_itself(one.mask)


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
    return _groups(one.members, one.shape.heads // one.shape.kv_heads, max(1, MOST_ROWS // q_len))


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
