"""The meaning of a variant: dense, float64 inside, one formula. The oracle of every test."""

from __future__ import annotations

import torch

from attn_compiler.algebra.variant import Variant
from attn_compiler.targets.operands import Operands
from attn_compiler.targets.torch_target import Result, attend_densely, by_group


def attend_reference(operands: Operands, variant: Variant, *, lse: bool = False) -> Result:
    """Attend densely in float64; the output has the dtype of the operands."""

    def attend(part: Operands, of_group: Variant) -> Result:
        out, totals = attend_densely(part, of_group, torch.float64, lse=lse)
        return out.to(part.q.dtype), totals

    return by_group(operands, variant, attend)
