"""What is decided for every site, and what was refused: values that a report prints and a rewrite carries out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from attn_compiler.algebra.storage import Held
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.kept import Caches
from attn_compiler.planning.site import Site
from attn_compiler.planning.uses import Uses

# Rewritten with the same meaning, rewritten as a rule asks, the model's own code as asked, or in spite of what a rule asks.
Outcome = Literal["exact", "approximate", "kept", "refused"]


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
    exact: bool  # whether what runs computes what the model does, its projections included
    target: str | None
    form: str = ""  # how the target runs it
    refusals: tuple[Refusal, ...] = ()
    refused: bool = False  # the rule wanted something else, and could not have it
    error: float | None = None  # of what the rule asks for, as calibration measured it: the relative L2 of the site's output
    projections: Held | None = None  # how the factors of its projections are held; None: as they come
    caches: Caches | None = None  # what it costs to generate with it; None where nothing is generated

    @property
    def outcome(self) -> Outcome:
        """What this means for the results of the model, in one word."""
        if self.refused:
            return "refused"
        if self.target is None and self.projections is None:
            return "kept"
        return "exact" if self.exact else "approximate"


@dataclass(frozen=True)
class Plan:
    """The whole intention, before anything changes."""

    decisions: tuple[Decision, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
    remarks: tuple[str, ...] = ()
    uses: Uses = field(default_factory=Uses)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What whoever compiles the model should look at."""
        return (*self.remarks, *self.uses.warnings())

    def __add__(self, other: Plan) -> Plan:
        """Plans of several graphs of one model, as one."""
        return Plan(
            self.decisions + other.decisions,
            self.near_misses + other.near_misses,
            tuple(dict.fromkeys(self.remarks + other.remarks)),
            self.uses + other.uses,
        )
