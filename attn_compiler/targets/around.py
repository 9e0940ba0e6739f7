"""Lets kernels carry what becomes of keys before and of results behind them: both are plain operators, whatever attends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from attn_compiler.algebra.variant import Variant
from attn_compiler.targets.contexts import in_context
from attn_compiler.targets.operands import Operands
from attn_compiler.targets.outputs import put_out
from attn_compiler.targets.torch_target import Result, by_group

Attend = Callable[[Operands, Variant], Result]
CARRIED = ("output", "context")


def refuse(variant: Variant) -> str | None:
    """Why what stands around one launch cannot be carried; None if it can."""
    if any(one.context != variant.context for _, one in variant.groups):
        return "its heads attend in one launch, and some want other keys than the rest"
    return None


def without(variant: Variant) -> Variant:
    """What is left for a kernel."""
    groups = tuple((heads, without(one)) for heads, one in variant.groups)
    return replace(variant, output=(), context=(), groups=groups)


def around(operands: Operands, variant: Variant, attend: Attend) -> Result:
    """What `attend` makes of what is left for it, with what stands around that."""
    inner = without(variant)
    if inner == variant:
        return attend(operands, variant)
    dtype = operands.q.dtype
    real = torch.promote_types(dtype, torch.float32)
    fewer, _ = in_context(operands, replace(variant, groups=()), real)
    out, totals = attend(replace(fewer, q=operands.q, k=fewer.k.to(dtype), v=fewer.v.to(dtype)), inner)

    def finished(part: Operands, of_group: Variant) -> Result:
        own = out if len(part.head_numbers) == out.shape[1] else out[:, list(part.head_numbers)]
        return put_out(own, part, of_group, real).to(dtype), None

    return by_group(operands, variant, finished)[0], totals
