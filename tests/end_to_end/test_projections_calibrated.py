"""What rounded projections cost, as calibration measures it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import attn_compiler as attn
from end_to_end.projected import POLICY, SLOTS, Attention, by_hand, inputs, made, off, refusal

pytestmark = pytest.mark.usefixtures("quick")


@torch.no_grad()
def test_calibration_measures_what_projections_cost() -> None:
    model, x = made(Attention), inputs()
    measured = attn.calibrate(model, POLICY, [[x]]).measured
    assert measured is not None
    hand = by_hand(model, "q", "k", "v", "o")
    heads = [
        sdpa(*(one.unflatten(-1, (4, 8)).transpose(1, 2) for one in run.operands(x)))  # type: ignore[operator]
        for run in (hand, model)
    ]
    [cost] = measured.sites.values()
    assert cost.whole.relative == pytest.approx(off(hand(x), model(x)), rel=1e-4)
    assert [head.relative for head in cost.heads] == pytest.approx(
        [off(a, b) for a, b in zip(*(y.unbind(1) for y in heads), strict=True)], rel=1e-4
    )
    assert measured.logits is not None
    assert measured.logits.relative == pytest.approx(cost.whole.relative, rel=1e-4)


@torch.no_grad()
def test_a_tolerance_counts_projections() -> None:
    model, x = made(Attention), inputs()
    strict = {"version": 1, "rules": [{"attn": SLOTS, "tolerance": {"site": 1e-5}}]}
    assert "was not measured" in refusal(model, strict)
    kept = attn.calibrate(model, strict, [[x]])
    [decision] = attn.explain(model, (x,), policy=kept).decisions
    assert "beyond its `tolerance` of 1e-05" in decision.refusals[0].reason
    bearing = {"version": 1, "rules": [{"attn": SLOTS, "tolerance": {"site": 0.1, "logits": 0.1}}]}
    [decision] = attn.explain(model, (x,), policy=attn.calibrate(model, bearing, [[x]])).decisions
    assert decision.outcome == "approximate"


@torch.no_grad()
def test_the_inputs_of_each_attention_are_those_of_the_exact_model() -> None:
    model = made(lambda: nn.Sequential(Attention(), Attention()))
    x = inputs()
    measured = attn.calibrate(model, POLICY, [[x]]).measured
    assert measured is not None
    first, second = model.children()
    given = first(x)
    wanted = [off(by_hand(one, *"qkvo")(at), one(at)) for one, at in ((first, x), (second, given))]
    assert [cost.whole.relative for cost in measured.sites.values()] == pytest.approx(wanted, rel=1e-4)


@torch.no_grad()
def test_one_choice_for_all_heads_where_projections_are_among_what_may_be_chosen() -> None:
    model, x = made(Attention), inputs()
    candidates = {"rough": {"storage": {"projections": "int4"}}, "fine": SLOTS}
    for within, chosen in ((0.05, "fine"), (10.0, "rough"), (1e-9, "exact")):
        [rule] = attn.choose(model, candidates, [[x]], within=within)["rules"]  # type: ignore[misc]
        assert rule["attn"] == chosen
