"""Lets tokens that are much alike attend as one, by plain operators around whatever attends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_compiler.algebra.context import Merge
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError
from attn_compiler.targets.mixing import Result
from attn_compiler.targets.operands import Operands

Attend = Callable[[Operands, Variant], Result]


def merged(
    operands: Operands, variant: Variant, real: torch.dtype, dtype: torch.dtype, attend: Attend, gather: Attend | None = None
) -> Result:
    """What `attend` makes of a call of fewer tokens in `dtype`, where the variant merges some; each has its group's result.

    Agents gather the values by `gather`, where that is another way.
    """
    one = next((one for one in variant.context if isinstance(one, Merge)), None)
    if one is None:
        return attend(operands, variant)
    _check(operands, variant, one)
    operands = operands.before_rotation(variant.unrotated)
    told = replace(variant, unrotated=(), context=tuple(x for x in variant.context if x is not one))
    likeness = _likeness(_metric(operands, one, torch.promote_types(real, torch.float32)), one)
    group = likeness.groups(one.share)
    q, k, v = (group.means(x.to(real)).to(dtype) for x in (operands.q, operands.k, operands.v))
    fewer = replace(operands, q=q, k=k, v=v, q_positions=0, k_positions=0, unrotated=None, codes=None)
    if one.agents is not None:
        agents = likeness.groups(one.agents).means(operands.q.to(real)).to(dtype)
        gathered = (gather or attend)(replace(fewer, q=agents), Variant(scale=variant.scale))[0]
        told = operands.of_query_heads(replace(told, scale=variant.scale**one.power))
        fewer = replace(fewer, k=agents, v=gathered.to(dtype))
    out = attend(fewer, told)[0]
    if one.shortcut:
        out = out.to(real) + one.shortcut * v.to(real).repeat_interleave(out.shape[1] // v.shape[1], dim=1)
    return group.handed_back(out), None


@dataclass(frozen=True)
class _Groups:
    """Which of `count` groups each token is in: [batch, tokens]."""

    of: Tensor
    count: int

    def means(self, x: Tensor) -> Tensor:
        """[batch, heads, groups, dim] of [batch, heads, tokens, dim]."""
        sums = x.new_zeros(*x.shape[:2], self.count, x.shape[3]).scatter_add(2, self._like(x), x)
        sizes = x.new_zeros(x.shape[0], self.count).scatter_add(1, self.of, torch.ones_like(self.of, dtype=x.dtype))
        return sums / sizes[:, None, :, None]

    def handed_back(self, x: Tensor) -> Tensor:
        """What each group has, for each of its tokens."""
        return x.gather(2, self._like(x))

    def _like(self, x: Tensor) -> Tensor:
        return self.of[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])


@dataclass(frozen=True)
class _Likeness:
    """Of each token [batch, tokens] its `rank`, the likest first, and the number of the waiting one that it is `likest`.

    `waits` says which tokens wait, and `cell` numbers these [tokens].
    """

    one: Merge
    rank: Tensor
    likest: Tensor
    waits: Tensor
    cell: Tensor

    def groups(self, share: float) -> _Groups:
        """Tokens that stay alone, in order of rank, and then those that waited, with all that came to them."""
        left = self.one.left(share)
        alone, merged = left - self.one.waiting, prod(self.one.grid) - left
        joined = torch.where(self.waits, self.cell, self.likest) + alone
        stays = (self.rank >= merged) & ~self.waits
        return _Groups(torch.where(stays, self.rank - merged, joined), left)


def _likeness(metric: Tensor, one: Merge) -> _Likeness:
    """By cosines of [batch, tokens, numbers]; what is chosen has no gradient."""
    rows, columns = one.grid
    whole = [size // own for size, own in zip(one.grid, one.cell, strict=True)]
    token = torch.arange(rows * columns, device=metric.device)
    places = [(token // columns, one.cell[0], whole[0]), (token % columns, one.cell[1], whole[1])]
    first = [(at % size == 0) & (at // size < count) for at, size, count in places]
    waits = first[0] & first[1]
    cell = places[0][0] // one.cell[0] * whole[1] + places[1][0] // one.cell[1]
    of_tokens = F.normalize(metric.detach(), dim=-1)
    ends = [size * count for _, size, count in places]
    corners = of_tokens.reshape(-1, rows, columns, metric.shape[-1])[:, : ends[0] : one.cell[0], : ends[1] : one.cell[1]].flatten(
        1, 2
    )
    with torch.autocast(metric.device.type, enabled=False):  # in 16 bits many tokens are equally alike
        cosine, likest = (of_tokens @ corners.mT).max(dim=-1)
    order = cosine.masked_fill(waits, -math.inf).argsort(dim=-1, descending=True)
    rank = torch.zeros_like(order).scatter(1, order, token.expand_as(order))
    return _Likeness(one, rank, likest, waits, cell)


def _metric(operands: Operands, one: Merge, real: torch.dtype) -> Tensor:
    """What tells how much alike tokens are."""
    if not one.metric:
        return operands.k.to(real).mean(dim=1)
    return operands.tables[one.metric].to(real).expand(operands.q.shape[0], -1, -1)


def _check(operands: Operands, variant: Variant, one: Merge) -> None:
    tokens = prod(one.grid)
    if variant.groups or len(operands.head_numbers) != operands.heads:
        raise ShapeError("tokens are merged for all heads alike, and here some heads attend otherwise")
    if tokens != operands.q_len or tokens != operands.k_len:
        said = f"there are {operands.q_len} queries and {operands.k_len} keys"
        raise ShapeError(f"its context merges the tokens of a grid of {' by '.join(map(str, one.grid))}, and {said}")
