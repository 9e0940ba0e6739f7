"""Rearranges queries into blocks that meet only the keys within reach: time and memory grow with the reach, not with k_len."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.variant import EmptyRows, Variant
from attn_compiler.planning.site import UNKNOWN_LENGTH
from attn_compiler.targets.arrangement import Arrangement, Layout, gathered, in_a_row, split, undivided
from attn_compiler.targets.arrays import Arrays
from attn_compiler.targets.operands import PLACE, Operands
from attn_compiler.targets.reach import Reach, reach, shows_itself
from attn_compiler.torch_private import likely, statically_known_true

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 512


def near_or_whole(operands: Operands, variant: Variant, real: torch.dtype) -> Layout:
    """Blocks of queries where the mask bounds distances and that pays; else every query meets every key."""
    near = worthwhile(operands, variant)
    return blocked(operands, real, *near) if near else undivided(operands, real)


def blocked(operands: Operands, real: torch.dtype, within: Reach, block: int) -> Layout:
    """Axes [batch, blocks, heads, tokens, dim]; the number of operations is the same for every length."""
    device, q_len, k_len = operands.q.device, operands.q_len, operands.k_len
    first_query, first_key = operands.first_query, operands.k_positions
    assert first_query is not None
    assert not isinstance(first_key, Tensor)
    count = (q_len + block - 1) // block
    i = torch.arange(count * block, device=device).reshape(count, 1, block, 1)
    start = torch.arange(count, device=device)[:, None] * block
    start = cast(Tensor, start + (first_query - first_key - within.farthest))
    near = start + torch.arange(block + within.width, device=device)
    first = torch.arange(within.prefix, device=device).expand(count, within.prefix)
    keys = torch.cat([first, near], dim=1)
    exists = torch.cat([torch.lt(first, k_len), torch.ge(near, within.prefix) & torch.lt(near, k_len)], dim=1)
    symbols = {
        **operands.numbers(),
        **operands.head_coordinates(trailing=2),
        e.b: torch.arange(operands.q.shape[0], device=device).reshape(-1, 1, 1, 1, 1),
        e.i: i,
        e.q: i + first_query,
        PLACE: keys[:, None, None, :],
        e.k: keys[:, None, None, :] + first_key,
    }
    at = {e.b: 5} | ({e.h: 3} if operands.head_numbers == tuple(range(operands.heads)) else {})
    places = keys.clamp(0, k_len - 1)
    q, k, v = split(_lengthened(operands.q, count * block), count), gathered(operands.k, places), gathered(operands.v, places)
    arrays = Arrays(symbols, operands.tables, real, device, at)
    part = Arrangement(q, k, v, arrays, exists[:, None, None, :])
    return Layout((part,), lambda found: _shortened(in_a_row(found[0]), q_len))


def _shortened(tokens: Tensor, q_len: int) -> Tensor:
    """The same without the queries that fill the last block."""
    if isinstance(q_len, int):
        return tokens[:, :, :q_len]
    return tokens.index_select(2, torch.arange(q_len, device=tokens.device))  # a slice would be asked whether it is contiguous


def worthwhile(operands: Operands, variant: Variant) -> tuple[Reach, int] | None:
    """The reach and the size of blocks, where these save at least half of the work.

    Blocks are right for every length; whether they pay is judged by the likely one, without a guard.
    """
    if isinstance(operands.k_positions, Tensor) or operands.first_query is None:
        return None
    if variant.storage.pv and variant.storage.pv.numbers.block:
        return None  # which weights share a scale depends on where their keys stand
    within = reach(variant.mask)
    if within is None or within.width < 0 or (within.prefix and not operands.counts_from_zero()):
        return None
    if variant.empty_rows is not EmptyRows.ZERO and not every_query_sees_itself(operands, variant):
        return None  # the mean of v, or the unmasked row, is of all keys
    q_len, k_len = (likely(size, UNKNOWN_LENGTH) for size in (operands.q_len, operands.k_len))
    block = pays(within, q_len, k_len, exact=isinstance(operands.q_len, int))
    return None if block is None else (within, block)


def pays(within: Reach, q_len: int, k_len: int, *, exact: bool = True) -> int | None:
    """The size of blocks, where they save at least half of the work; `exact`: `q_len` is what it will always be."""
    block = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, 1 << (within.width // 2).bit_length()))
    block = min(block, q_len) if exact else block
    return block if q_len > 0 and 2 * (within.prefix + within.width + block) <= k_len else None


def every_query_sees_itself(operands: Operands, variant: Variant) -> bool:
    """Whether no row can be empty, because the key at each query's own position exists and is visible."""
    if isinstance(operands.k_positions, Tensor) or operands.first_query is None or not shows_itself(variant.mask):
        return False
    offset = operands.first_query - operands.k_positions
    return statically_known_true(offset >= 0) and statically_known_true(offset + operands.q_len <= operands.k_len)


def _lengthened(x: Tensor, length: int) -> Tensor:
    """More tokens, whose results nobody reads. Padding asks whether there are any, which a dynamic length cannot say for good."""
    if isinstance(x.shape[2], int):
        return F.pad(x, (0, 0, 0, length - x.shape[2]))
    return x.index_select(2, torch.arange(length, device=x.device).clamp(max=x.shape[2] - 1))
