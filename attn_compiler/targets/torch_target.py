"""Attention as plain torch operators: traced, compiled and exported like any other code, for every variant there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from attn_compiler.algebra.expr import Sort, score
from attn_compiler.algebra.variant import EmptyRows, Variant, passed_over
from attn_compiler.targets.arrays import Value
from attn_compiler.targets.blocks import Arrangement, blocked, every_query_sees_itself, in_real, unblocked, whole, worthwhile
from attn_compiler.targets.explicit import explicit
from attn_compiler.targets.fused import fits, fused, swallows
from attn_compiler.targets.operands import Operands, head_groups
from attn_compiler.targets.reach import is_causal
from attn_compiler.targets.rounded import held
from attn_compiler.torch_private import statically_known_true

CARRIED = ("storage",)
Result = tuple[Tensor, Tensor | None]  # the output, and the log-sum-exp where it was asked for


def refuse(variant: Variant, *, lse: bool = False) -> str | None:
    """Why this target cannot carry a variant; None if it can."""
    unnormalized = [part.normalizer.name for part in variant.parts() if part.normalizer.total is None]
    if lse and unnormalized:
        return f"the rows of `{unnormalized[0]}` are not normalized, so they have no log-sum-exp"
    return passed_over(variant, CARRIED)


def attend_torch(operands: Operands, variant: Variant, *, lse: bool = False) -> Result:
    """Attend, in the form that the variant and what is statically known of the operands allow."""

    def attend(part: Operands, of_group: Variant) -> Result:
        out, totals = _attend(held(part, of_group.storage), of_group, lse)
        return out.to(operands.q.dtype), totals

    return by_group(operands, variant, attend)


def by_group(operands: Operands, variant: Variant, attend: Callable[[Operands, Variant], Result]) -> Result:
    """Let every group of heads attend by itself, and put the heads back in order."""
    groups = head_groups(variant, operands.heads)
    if len(groups) == 1:
        return attend(operands, groups[0][1])
    parts = [attend(operands.take(members), of_group) for members, of_group in groups]
    order = [head for members, _ in groups for head in members]
    totals = [x for _, x in parts if x is not None]
    return _reordered([out for out, _ in parts], order), _reordered(totals, order) if totals else None


def visible_keys(arrangement: Arrangement, variant: Variant) -> Value:
    """Which keys a query sees: True for all. Real numbers in a mask decide, so they are in float64."""
    arrays = replace(arrangement.arrays, real=torch.float64)
    shown = arrays.read(variant.mask)
    if arrangement.exists is None:
        return shown
    return arrangement.exists if shown is True else arrays.tensor(shown, Sort.BOOL) & arrangement.exists


def _attend(operands: Operands, variant: Variant, lse: bool) -> Result:
    real = torch.promote_types(operands.q.dtype, torch.float32)
    near = worthwhile(operands, variant)
    arrangement = blocked(operands, real, *near) if near else whole(operands, real)
    rule = EmptyRows.ZERO if every_query_sees_itself(operands, variant) else variant.empty_rows
    dropout = variant.dropout if operands.training else 0.0
    totals = None
    exact_gradients = not swallows(variant.score, operands.risky)
    if not lse and exact_gradients and fits(variant, arrangement.arrays, operands.q.dtype):
        causal = near is None and _is_causal(operands, variant)
        q, k, v, arrays = arrangement.q, arrangement.k, arrangement.v, arrangement.arrays
        visible = True if causal else visible_keys(arrangement, variant)
        out = fused(q, k, v, variant, visible, arrays, causal=causal, rule=rule, dropout=dropout)
    else:
        out, totals = carry_out(in_real(arrangement, real), replace(variant, empty_rows=rule), dropout=dropout, lse=lse)
        out = out.to(operands.q.dtype)
    if near is None:
        return out, totals
    return unblocked(out, operands.q_len), None if totals is None else unblocked(totals[..., None], operands.q_len)[..., 0]


def carry_out(arrangement: Arrangement, variant: Variant, *, dropout: float, lse: bool) -> Result:
    """Attend by the written-out formula."""
    visible = arrangement.arrays.tensor(visible_keys(arrangement, variant), Sort.BOOL)
    q, k, v = arrangement.q, arrangement.k, arrangement.v
    return explicit(q, k, v, variant, visible, arrangement.arrays, dropout=dropout, lse=lse)


def _is_causal(operands: Operands, variant: Variant) -> bool:
    first_query, first_key = operands.first_query, operands.k_positions
    if first_query is None or isinstance(first_key, Tensor) or variant.score != score or not is_causal(variant.mask):
        return False
    return statically_known_true(first_query == first_key) and statically_known_true(operands.q_len == operands.k_len)


def _reordered(parts: list[Tensor], order: list[int]) -> Tensor:
    joined = torch.cat(parts, dim=1)
    back = sorted(range(len(order)), key=order.__getitem__)
    return joined if back == list(range(len(order))) else torch.stack([joined[:, place] for place in back], dim=1)
