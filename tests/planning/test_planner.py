"""Targets are asked in their order, and the first that gains takes a site."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from attn_compiler import library
from attn_compiler.algebra.expr import k, q
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.planner import Carried, plan
from attn_compiler.planning.site import Frame, Kind, Phase, Site
from attn_compiler.runtime.targets import TARGETS

NEAR = Variant(mask=(k <= q) & (q - k < 64))
SITE = Site(
    "site", Kind.SELF, Phase.PREFILL, 0, 1, 1, 8, 8, 4096, 4096, 64, 64, "float32", NEAR, Frame(), 4096, 4096, device="cuda"
)  # fmt: skip
NARROW = {"version": 1, "rules": [{"match": {}, "attn": {"mask": "window(8)"}}]}


@dataclass(frozen=True)
class One:
    """A target that carries everything, and gains or does not."""

    name: str
    gains: bool

    def carry(self, site: Site, variant: Variant) -> Carried | Refusal:
        return Carried("somehow", self.gains)


def test_a_target_that_gains_nothing_does_not_end_the_search() -> None:
    [decision] = plan([SITE], library.load_policy("exact"), [One("idle", gains=False), One("fast", gains=True)]).decisions
    assert decision.target == "fast"
    [decision] = plan([SITE], library.load_policy("exact"), [One("idle", gains=False)]).decisions
    assert decision.target is None


@pytest.mark.parametrize("policy", ["exact", NARROW])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_what_has_run_on_one_is_asked_first(policy: object, dtype: str) -> None:
    site = replace(SITE, dtype=dtype)
    [decision] = plan([site], library.load_policy(policy), tuple(TARGETS.values())).decisions  # type: ignore[arg-type]
    assert decision.target == "torch"
