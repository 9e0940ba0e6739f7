"""The meaning of a variant: dense, float64 inside, one formula. The oracle of every test."""

from __future__ import annotations

import torch

from attn_compiler.algebra.variant import Variant
from attn_compiler.targets.blocks import in_real, whole
from attn_compiler.targets.operands import Operands
from attn_compiler.targets.rounded import held
from attn_compiler.targets.torch_target import Result, by_group, carry_out


def attend_reference(operands: Operands, variant: Variant, *, lse: bool = False) -> Result:
    """Attend densely in float64; the output has the dtype of the operands."""

    def attend(part: Operands, of_group: Variant) -> Result:
        arrangement = in_real(whole(held(part, of_group.storage), torch.float64), torch.float64)
        dropout = of_group.dropout if part.training else 0.0
        out, totals = carry_out(arrangement, of_group, dropout=dropout, lse=lse)
        return out.to(part.q.dtype), totals

    return by_group(operands, variant, attend)
