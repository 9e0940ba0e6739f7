"""The target of files that run without us: attention as PyTorch's own operators, for sizes that are known."""

from __future__ import annotations

from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.planner import Carried
from attn_compiler.planning.site import Site
from attn_compiler.targets.choice import TorchTarget
from attn_compiler.targets.operands import Operands
from attn_compiler.targets.torch_target import Result

_TORCH = TorchTarget()


class PlainTarget:
    """Plain operators that do the same in every call."""

    name = "torch"

    def refuse(self, operands: Operands, variant: Variant, *, lse: bool = False) -> str | None:
        return _TORCH.refuse(operands, variant, lse=lse)

    def attend(self, operands: Operands, variant: Variant, *, lse: bool = False) -> Result:
        return _TORCH.attend(operands, variant, lse=lse)

    def carry(self, site: Site, variant: Variant) -> Carried | Refusal:
        if any(part.dropout for part in variant.parts()):
            return Refusal(self.name, "its dropout is active: call `model.eval()`")
        return _TORCH.carry(site, variant)
