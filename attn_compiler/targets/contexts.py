"""Applies what a variant does to keys and values first: the same call with fewer keys, and a variant without that wish."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.context import Context, Merge, added
from attn_compiler.algebra.expr import Sort
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError
from attn_compiler.targets.extra import with_extra
from attn_compiler.targets.operands import Operands, head_groups, in_order
from attn_compiler.targets.products import per_kv_head


def in_context(operands: Operands, variant: Variant, real: torch.dtype) -> tuple[Operands, Variant]:
    """The call of a variant without branches, its keys and values pooled or gathered, in `real`, or others in front of them.

    Its groups want the same of their keys as it does; agents gather for each as it scales and biases.
    """
    for one in variant.context:
        if isinstance(one, Merge):
            raise ShapeError("tokens are merged around a whole attention, not in a branch whose sums others share")
        if one.how == "extra":
            operands, variant = with_extra(operands, variant, one)
            continue
        q, k, v = (x.to(real) for x in (operands.q, operands.k, operands.v))
        if one.how == "pool":
            k, v = (_pooled(x, one) for x in (k, v))
        else:
            k, v = _of_groups(replace(operands, q=q, k=k, v=v), variant, one)
            variant = _with_second(operands.of_query_heads(variant), one)
        operands = replace(operands, q=q, k=k, v=v, q_positions=0, k_positions=0)
    return operands, replace(variant, context=())


def _of_groups(operands: Operands, variant: Variant, one: Context) -> tuple[Tensor, Tensor]:
    """Agents in the place of keys, and what they gathered in that of values, for all heads."""
    groups = head_groups(variant, operands.heads)
    if len(groups) == 1:
        return _agents(operands, groups[0][1], one)
    agents, gathered = zip(*(_agents(operands.take(heads), of_group, one) for heads, of_group in groups), strict=True)
    order = [head for heads, _ in groups for head in heads]
    return in_order(agents, order), in_order(gathered, order)


def _agents(operands: Operands, variant: Variant, one: Context) -> tuple[Tensor, Tensor]:
    q, k, v = operands.q, operands.k, operands.v
    arrays = operands.arrays(q.dtype)
    if len(one.sizes) == 1:
        agents = _in_rows(F.adaptive_avg_pool1d(_on_grid(q, one), one.sizes[0]), q)
    else:
        agents = _in_rows(F.adaptive_avg_pool2d(_on_grid(q, one), (one.sizes[0], one.sizes[1])), q)
    scores = per_kv_head(agents, k.mT) * arrays.tensor(arrays.read(variant.scale), Sort.REAL)
    if one.name:
        places = {added: torch.arange(one.count, device=q.device)[:, None], e.k: torch.arange(k.shape[2], device=q.device)}
        scores = scores + arrays.tensor(arrays.read(one.expressions()[0], places), Sort.REAL)
    return agents, per_kv_head(scores.softmax(dim=-1), v)


def _with_second(variant: Variant, one: Context) -> Variant:
    """The variant that adds a bias to the scores of queries and agents, which stand in the place of keys."""
    if not one.second:
        return variant
    groups = tuple((heads, _with_second(of_group, one)) for heads, of_group in variant.groups)
    return replace(variant, score=variant.score + one.expressions()[-1].substitute({added: e.k}), groups=groups)


def _pooled(x: Tensor, one: Context) -> Tensor:
    """Means of neighbors; at the far end of those that there are."""
    pool = F.avg_pool1d if len(one.sizes) == 1 else F.avg_pool2d
    return _in_rows(pool(_on_grid(x, one), one.sizes, ceil_mode=True, count_include_pad=False), x)


def _on_grid(x: Tensor, one: Context) -> Tensor:
    """Tokens as a pool wants them: [batch · heads, channels, axes of the grid]."""
    laid_out = x.flatten(0, 1).mT
    if len(one.sizes) == 1:
        return laid_out
    if x.shape[2] != one.grid[0] * one.grid[1]:
        raise ShapeError(f"its context pools a grid of {one.grid[0]} by {one.grid[1]}, and there are {x.shape[2]} tokens")
    return laid_out.reshape(*laid_out.shape[:2], *one.grid)


def _in_rows(pooled: Tensor, like: Tensor) -> Tensor:
    """What was pooled as [batch, heads, tokens, channels] again."""
    flat = pooled.flatten(2).mT
    return flat.reshape(*like.shape[:2], *flat.shape[1:])
