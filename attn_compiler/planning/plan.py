"""What is decided for every site, and what was refused: values that a report prints and a rewrite carries out."""

from __future__ import annotations

from dataclasses import dataclass

from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.site import Site


@dataclass(frozen=True)
class Refusal:
    """Why something is not done. A value, not an exception."""

    by: str  # who refuses: a rule, a target, the rewrite
    reason: str


@dataclass(frozen=True)
class NearMiss:
    """Something that looked like an attention and is left alone."""

    name: str  # the module it stands in
    anchor: str  # the operation that was looked at
    reason: str  # the first thing that disagreed


@dataclass(frozen=True)
class Decision:
    """What becomes of one site: `variant` on `target`, or its original code where `target` is None."""

    site: Site
    rule: str  # "rule 2 (name)", or "no rule"
    variant: Variant
    exact: bool
    target: str | None
    form: str = ""  # how the target runs it
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The whole intention, before anything changes."""

    decisions: tuple[Decision, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
    warnings: tuple[str, ...] = ()

    def __add__(self, other: Plan) -> Plan:
        """Plans of several graphs of one model, as one."""
        return Plan(self.decisions + other.decisions, self.near_misses + other.near_misses, self.warnings + other.warnings)
