"""Every ready policy does something at a plain site, or leaves it alone, and never by a refusal."""

from __future__ import annotations

import pytest

from attn_compiler import library
from attn_compiler.algebra.expr import k, q, true
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.planner import plan
from attn_compiler.planning.site import Frame, Kind, Phase, Site
from attn_compiler.targets.choice import TorchTarget

COMPLETE = [name for name in library.ready_policies() if not library.load_policy(name).parameters]  # others are trained first
SEES_ALL = ("agent", "agentsd", "tome")
LAYERS = 8
TOKENS = 65536


def sites(name: str) -> tuple[Site, ...]:
    """A model of eight layers with long prompts, causal unless the policy is for models that see everything."""
    mask = true if name in SEES_ALL else k <= q
    return tuple(
        Site(
            f"model.layers.{layer}.self_attn", Kind.SELF, Phase.PREFILL, layer, LAYERS, 1, 8, 8, TOKENS, TOKENS, 64, 64,
            "float32", Variant(mask=mask), Frame(), TOKENS, TOKENS, input_width=512, normed=True,
        )
        for layer in range(LAYERS)
    )  # fmt: skip


@pytest.mark.parametrize("name", COMPLETE)
def test_a_ready_policy_is_carried_out_everywhere(name: str) -> None:
    made = plan(sites(name), library.load_policy(name), (TorchTarget(),))
    assert [decision.refusals for decision in made.decisions] == [()] * LAYERS
    assert made.warnings == ()


@pytest.mark.parametrize("name", COMPLETE)
def test_a_ready_policy_changes_something_unless_it_is_called_exact(name: str) -> None:
    made = plan(sites(name), library.load_policy(name), (TorchTarget(),))
    assert all(decision.exact for decision in made.decisions) is (name == "exact")


def test_the_digests_of_ready_policies_differ() -> None:
    digests = [library.load_policy(name).digest for name in library.ready_policies()]
    assert len(set(digests)) == len(digests)
