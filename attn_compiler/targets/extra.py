"""Keys and values that a variant brings along: they stand in front of all others, whose positions begin behind them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.context import Context, added
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.feature import component
from attn_compiler.algebra.simplify import simplify
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError
from attn_compiler.targets.arrays import Arrays, Value
from attn_compiler.targets.operands import PLACE, Operands, kv_owners, numbered


def with_extra(operands: Operands, variant: Variant, one: Context) -> tuple[Operands, Variant]:
    """The same call with these keys in front, and the variant that shows them to every query and says nothing else of them."""
    first, (count,) = operands.k_positions, one.sizes
    if not isinstance(first, int):
        raise ShapeError("keys of its own stand in front of all others, and here nobody knows the position of the first one")
    of_k, of_v = (
        _rows(operands, expression, count, like)
        for expression, like in zip(one.expressions(), (operands.k, operands.v), strict=True)
    )
    at = operands.q_positions
    longer = replace(
        operands,
        k=torch.cat([of_k, operands.k], dim=2),
        v=torch.cat([of_v, operands.v], dim=2),
        q_positions=None if at is None else at + count,
    )
    return longer, _told(variant, count, first)


def _told(variant: Variant, count: int, first: int) -> Variant:
    """What a variant says of tokens, said of those behind `count` others."""
    behind = {e.q: e.q - count, e.k: e.k - count, PLACE: PLACE - count, e.k_len: e.k_len - count}
    own = e.k < first + count
    moved = replace(variant, groups=()).map(lambda x: x.substitute(behind))
    return replace(
        moved,
        mask=simplify(own | moved.mask),
        score=moved.score if moved.score == e.score else e.where(own, e.score, moved.score),
        groups=tuple((heads, _told(group, count, first)) for heads, group in variant.groups),
    )


def _rows(operands: Operands, expression: Expr, count: int, like: Tensor) -> Tensor:
    """The keys or values as those of the call are, [batch, kv heads, count, numbers]."""
    device, ratio = like.device, operands.heads // operands.kv_heads
    one_each = like.shape[1] == len(operands.head_numbers)  # behind agents
    owners = [head // ratio for head in operands.head_numbers] if one_each else kv_owners(operands.head_numbers, ratio)
    kv = numbered(owners, device)[:, None, None]
    at: dict[Expr, Value] = {
        **operands.numbers(),
        e.b: torch.arange(like.shape[0], device=device)[:, None, None, None],
        e.kv: kv,
        added: torch.arange(count, device=device)[:, None],
        component: torch.arange(like.shape[3], device=device),
    }
    arrays = Arrays(at, operands.tables, torch.promote_types(like.dtype, torch.float32), device)
    found = arrays.tensor(arrays.read(expression), Sort.REAL)
    return found.to(like.dtype).expand(*like.shape[:2], count, like.shape[3])
