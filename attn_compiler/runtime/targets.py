"""The targets, in the order in which they are asked: what a plan chooses from, and what runs a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.planner import Carried
from attn_compiler.planning.site import Site
from attn_compiler.runtime.cpp import CppTarget
from attn_compiler.runtime.triton import TritonTarget
from attn_compiler.targets.choice import TorchTarget
from attn_compiler.targets.flex import FlexTarget
from attn_compiler.targets.operands import Operands
from attn_compiler.targets.torch_target import Result


class Attends(Protocol):
    """One way to run a call of attention."""

    @property
    def name(self) -> str: ...

    def refuse(self, operands: Operands, variant: Variant, *, lse: bool = False) -> str | None:
        """Why a call cannot run; None if it can."""

    def attend(self, operands: Operands, variant: Variant, *, lse: bool = False) -> Result:
        """Run a call that is not refused."""


class Target(Attends, Protocol):
    """One way to run the attentions of a model."""

    def carry(self, site: Site, variant: Variant) -> Carried | Refusal:
        """How a site would run, or why it should not."""


# Triton comes last, to be named: its kernels have run in its interpreter, and on no GPU yet.
TARGETS: Mapping[str, Target] = {target.name: target for target in (CppTarget(), TorchTarget(), TritonTarget())}
OPT_IN: Mapping[str, Attends] = {target.name: target for target in (FlexTarget(),)}  # for calls that name them
