"""Lets kernels carry what becomes of keys before and of results behind them: both are plain operators, whatever attends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError
from attn_compiler.targets.contexts import in_context
from attn_compiler.targets.merging import merged
from attn_compiler.targets.operands import Operands, head_groups, pick
from attn_compiler.targets.outputs import put_out
from attn_compiler.targets.torch_target import Result, by_group

_APART = "its heads attend in one launch, and some want other keys than the rest"
Attend = Callable[[Operands, Variant], Result]
CARRIED = ("output", "context")


def refuse(variant: Variant) -> str | None:
    """Why what stands around one launch cannot be carried; None if it can."""
    return _APART if len({one.context for _, one in variant.groups}) > 1 else None


def without(variant: Variant) -> Variant:
    """What is left for a kernel."""
    groups = tuple((heads, without(one)) for heads, one in variant.groups)
    return replace(variant, output=(), context=(), groups=groups)


def around(operands: Operands, variant: Variant, attend: Attend, gather: Attend | None = None) -> Result:
    """What `attend` makes of what is left for it, with what stands around that; `gather` as `merged` has it."""
    if without(variant) == variant:
        return attend(operands, variant)
    dtype = operands.q.dtype
    real = torch.promote_types(dtype, torch.float32)
    contexts = {one.context for _, one in head_groups(variant, operands.heads)}
    if len(contexts) > 1:
        raise ShapeError(_APART)

    def launched(part: Operands, one: Variant) -> Result:
        other, told = in_context(part, one, real)
        return attend(replace(other, q=part.q, k=other.k.to(dtype), v=other.v.to(dtype)), without(told))

    out, totals = merged(operands, replace(variant, context=contexts.pop()), real, dtype, launched, gather)

    def finished(part: Operands, of_group: Variant) -> Result:
        own = out if len(part.head_numbers) == out.shape[1] else pick(out, part.head_numbers)
        return put_out(own, part, of_group, real).to(dtype), None

    return by_group(operands, variant, finished)[0], totals
