"""Branches of a mix, each by a kernel where a target has one for it; PyTorch's operators attend in the others, and mix them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from attn_compiler.algebra.variant import How, Variant
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.planner import Carried
from attn_compiler.planning.site import Site
from attn_compiler.targets.operands import Operands
from attn_compiler.targets.torch_target import Kernel, Result, refuse

OPERATORS = "PyTorch's operators"
Refuse = Callable[..., str | None]  # as targets have it


def serves(operands: Operands, variant: Variant, refuse_kernel: Refuse) -> bool:
    """Whether a kernel attends in some branch."""
    mix = variant.mix
    if mix is None or mix.how is How.SHARED or variant.groups or operands.past or refuse(variant) is not None:
        return False
    return any(refuse_kernel(operands, branch, lse=mix.how is How.LSE) is None for _, branch in mix.branches)


def kernel(refuse_kernel: Refuse, attend: Callable[..., Result]) -> Kernel:
    """What attends in a branch, if it is not refused."""

    def run(operands: Operands, variant: Variant, lse: bool) -> Result | None:
        operands, variant = operands.before_rotation(variant.unrotated), replace(variant, unrotated=(), output=())
        some = len(operands.head_numbers) < operands.heads  # kernels count heads from the first on
        return None if some or operands.past or refuse_kernel(operands, variant, lse=lse) else attend(operands, variant, lse=lse)

    return run


def carried(site: Site, variant: Variant, carry: Callable[[Site, Variant], Carried | Refusal]) -> Carried | None:
    """How a site's branches attend; None where no kernel does."""
    if variant.mix is None or variant.mix.how is How.SHARED or variant.groups or refuse(variant) is not None:
        return None
    found = {name: carry(site, branch) for name, branch in variant.mix.branches}
    kernels = [one for one in found.values() if isinstance(one, Carried) and one.instead is None]
    if not kernels:
        return None
    forms = (f"{name}: {one.form if one in kernels else OPERATORS}" for name, one in found.items())
    return Carried("; ".join(forms), gains=any(one.gains for one in kernels))
