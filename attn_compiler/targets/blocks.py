"""Rearranges queries into blocks that meet only the keys within reach: time and memory grow with the reach, not with k_len."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.variant import EmptyRows, Variant
from attn_compiler.planning.site import UNKNOWN_LENGTH
from attn_compiler.targets.arrays import Arrays
from attn_compiler.targets.operands import PLACE, Operands
from attn_compiler.targets.reach import Reach, reach, shows_itself
from attn_compiler.torch_private import likely, statically_known_true

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 512


@dataclass(frozen=True)
class Arrangement:
    """Operands as [..., heads, tokens, dim], what expressions read over them, and which of the keys exist (None: all)."""

    q: Tensor
    k: Tensor
    v: Tensor
    arrays: Arrays
    exists: Tensor | None


def whole(operands: Operands, real: torch.dtype) -> Arrangement:
    """Every query meets every key: axes [batch, heads, tokens, dim]."""
    return Arrangement(operands.q, operands.k, operands.v, operands.arrays(real), None)


def blocked(operands: Operands, real: torch.dtype, within: Reach, block: int) -> Arrangement:
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
    q = _split(_lengthened(operands.q, count * block), count)
    arrays = Arrays(symbols, operands.tables, real, device, at)
    return Arrangement(q, _gather(operands.k, places), _gather(operands.v, places), arrays, exists[:, None, None, :])


def unblocked(out: Tensor, q_len: int) -> Tensor:
    """[batch, blocks, heads, tokens, dim] as [batch, heads, tokens, dim]."""
    tokens = out.transpose(1, 2).flatten(2, 3)
    if isinstance(q_len, int):
        return tokens[:, :, :q_len]
    return tokens.index_select(2, torch.arange(q_len, device=out.device))  # a slice would be asked whether it is contiguous


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


def in_real(arrangement: Arrangement, dtype: torch.dtype) -> Arrangement:
    """The same with operands of another dtype."""
    return replace(arrangement, q=arrangement.q.to(dtype), k=arrangement.k.to(dtype), v=arrangement.v.to(dtype))


def _lengthened(x: Tensor, length: int) -> Tensor:
    """More tokens, whose results nobody reads. Padding asks whether there are any, which a dynamic length cannot say for good."""
    if isinstance(x.shape[2], int):
        return F.pad(x, (0, 0, 0, length - x.shape[2]))
    return x.index_select(2, torch.arange(length, device=x.device).clamp(max=x.shape[2] - 1))


def _gather(x: Tensor, places: Tensor) -> Tensor:
    return _split(x.index_select(2, places.flatten()), places.shape[0])


def _split(x: Tensor, count: int) -> Tensor:
    """[batch, heads, tokens, dim] as [batch, blocks, heads, tokens of a block, dim]."""
    batch, heads, tokens, dim = x.shape
    return x.reshape(batch, heads, count, tokens // count, dim).transpose(1, 2)
