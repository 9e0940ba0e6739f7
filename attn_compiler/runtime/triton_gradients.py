"""Runs the backward Triton kernels of one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attn_compiler.algebra.variant import EmptyRows, Variant
from attn_compiler.runtime.gradients import Given, empty_like_tokens
from attn_compiler.runtime.kernels import Shape, spec_at
from attn_compiler.runtime.triton_kernels import Blocks, call, load, on_device, operand, sizes, table, visited
from attn_compiler.targets.operands import head_groups
from attn_compiler.targets.triton.gradient import by_key, by_query

_NUMBERS = 4  # that the kernels exchange of each query


@dataclass(frozen=True, eq=False)
class Pair:
    """The two kernels for some of the heads, in the order in which they run, and what they visit."""

    members: tuple[int, ...]
    empty_rows: EmptyRows
    by_query: Any
    by_key: Any
    of_queries: tuple[Tensor, ...]
    of_keys: tuple[Tensor, ...]
    owners: int  # key heads
    numbers: tuple[int, ...]  # the places of its tables among those of the call
    wanted: tuple[int, ...]  # of those that want gradients


@lru_cache(maxsize=128)
def _pairs(shape: Shape, wanted: tuple[bool, ...], blocks: Blocks, device: torch.device) -> tuple[Pair, ...]:
    groups = head_groups(shape.variant, shape.heads)
    return tuple(_pair(shape, members, variant, wanted, blocks, device) for members, variant in groups)


def _pair(
    shape: Shape, members: tuple[int, ...], variant: Variant, wanted: tuple[bool, ...], blocks: Blocks, device: torch.device
) -> Pair:
    spec = spec_at(shape, variant)
    numbers = tuple(shape.names.index(name) for name, _ in spec.tables)
    chosen = tuple(n for n in numbers if wanted[n])
    names = tuple(shape.names[n] for n in chosen)
    first, of_queries = visited(shape, members, variant, spec, (blocks.queries, blocks.keys))
    tile = blocks.keys, by_key_blocks(shape, blocks).queries
    second, of_keys = visited(shape, members, variant, spec, tile, by_key=True)
    owners, starts = np.unique(np.array(members) // (shape.heads // shape.kv_heads), return_index=True)
    shared = (*of_keys.values(), owners, np.append(starts, len(members)))
    kernels = load(by_query(spec, first, names)).backward, load(by_key(spec, second, names)).backward
    arrays = on_device(of_queries.values(), device), on_device(shared, device)
    return Pair(members, variant.empty_rows, *kernels, *arrays, len(owners), numbers, chosen)


def by_key_blocks(shape: Shape, blocks: Blocks) -> Blocks:
    """Sums of two kinds stay in registers: more warps share them, and wide heads meet fewer queries at once."""
    most = 64 if max(shape.dim, shape.value_dim) <= 64 else 32
    return replace(blocks, queries=min(blocks.queries, most), warps=8)


def gradients(shape: Shape, given: Given, wanted: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """The gradients of q, k, v and of the tables that are `wanted`."""
    blocks = Blocks()
    pairs = _pairs(shape, tuple(wanted), blocks, given.q.device)
    sums = [torch.zeros_like(t, dtype=torch.float32) if yes else None for t, yes in zip(given.tables, wanted, strict=True)]
    numbers = torch.empty((_NUMBERS, *given.kept.shape[1:]), dtype=torch.float32, device=given.q.device)
    of_q = empty_like_tokens(given.q)
    of_keys = []
    for pair in pairs:
        alone = len(pairs) == 1
        of_k, of_v = (empty_like_tokens(x) if alone else torch.zeros_like(x, dtype=torch.float32) for x in (given.k, given.v))
        _run(pair, shape, given, (of_q, of_k, of_v), numbers, sums, blocks)
        of_keys.append((of_k, of_v if pair.empty_rows is not EmptyRows.MEAN else of_v + _means(pair, shape, given)))
    of_k, of_v = (sum(parts[1:], parts[0]).to(given.k.dtype) for parts in zip(*of_keys, strict=True))
    return of_q, of_k, of_v, [x if x is None else x.to(t.dtype) for x, t in zip(sums, given.tables, strict=True)]


def _run(
    pair: Pair,
    shape: Shape,
    given: Given,
    results: tuple[Tensor, Tensor, Tensor],
    numbers: Tensor,
    sums: Sequence[Tensor | None],
    blocks: Blocks,
) -> None:
    q, k, v, out, above = (operand(x) for x in (given.q, given.k, given.v, given.out, given.above))
    of_q, of_k, of_v = (operand(x) for x in results)
    read = tuple(table(given.tables[n]) for n in pair.numbers)
    added = tuple(table(x) for x in (sums[n] for n in pair.wanted) if x is not None)
    rest = (read, added, *sizes(shape))
    tiles = -(-shape.q_len // blocks.queries), -(-shape.k_len // blocks.keys)
    grid = tiles[0], len(pair.members), shape.batch
    call(given.q, pair.by_query, grid, (q, k, v, out, above, of_q, given.kept, numbers, pair.of_queries, *rest), blocks.options())
    unseeing = numbers[3].amax(-1)  # of each head, where that matters
    visits = (*pair.of_keys, unseeing)
    arguments = (q, k, v, above, of_k, of_v, numbers, visits, *rest)
    call(given.q, pair.by_key, (tiles[1], pair.owners, shape.batch), arguments, by_key_blocks(shape, blocks).options())


def _means(pair: Pair, shape: Shape, given: Given) -> Tensor:
    """What queries that see no key add to every row of v."""
    unseeing = given.kept[0] == float("-inf")
    mine = torch.zeros(shape.heads, dtype=torch.bool, device=unseeing.device)
    mine[list(pair.members)] = True
    above = torch.where((unseeing & mine[:, None])[..., None], given.above.float(), 0.0).sum(2, keepdim=True)
    return above.reshape(shape.batch, shape.kv_heads, -1, 1, shape.value_dim).sum(2) / shape.k_len
