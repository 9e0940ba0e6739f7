"""Branches that are mixed, against the same written out with matrices in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_compiler import attend, reference
from attn_compiler.algebra import wire
from attn_compiler.errors import LanguageError, PolicyError, ShapeError
from attn_compiler.testing import assert_within_budget, check_variant, variant_of

HEADS, KV_HEADS, TOKENS, DIM = 4, 2, 13, 6
DISTANCE = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
NEAR, FAR = (DISTANCE >= 0) & (DISTANCE < 4), DISTANCE >= 4
LINEAR = {"mask": "causal & ~window(4)", "feature": "elu_one"}
BRANCHES = {"near": {"mask": "causal & window(4)"}, "far": LINEAR}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = drawn(2, HEADS, TOKENS, DIM), drawn(2, KV_HEADS, TOKENS, DIM, seed=1), drawn(2, KV_HEADS, TOKENS, 5, seed=2)
ALL_K, ALL_V = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (K, V))
SCORES = Q @ ALL_K.mT / math.sqrt(DIM)
WEIGHTS = (F.elu(Q) + 1) @ (F.elu(ALL_K) + 1).mT * FAR
SOFT = SCORES.masked_fill(~NEAR, -math.inf)
NEAR_OUT = SOFT.softmax(-1) @ ALL_V
FAR_OUT = WEIGHTS @ ALL_V / (WEIGHTS.sum(-1, keepdim=True) + 1e-6)


def assert_same(mix: Mapping[str, object], expected: Tensor, tables: Mapping[str, Tensor] | None = None) -> None:
    for run in (attend, reference):
        found = run(Q, K, V, {"mix": mix}, tables=tables)
        assert isinstance(found, Tensor)
        assert_within_budget(found, expected, expected)


def test_branches_are_added() -> None:
    assert_same({"how": "sum", "branches": BRANCHES}, NEAR_OUT + FAR_OUT)


def test_branches_are_added_by_weight() -> None:
    amount = torch.rand(HEADS, dtype=torch.float64)
    mix = {"how": "sum", "branches": BRANCHES, "weights": {"far": "amount", "near": 0.5}}
    assert_same(mix, 0.5 * NEAR_OUT + amount[:, None, None] * FAR_OUT, {"amount": amount})


def test_lerp_gives_the_other_branch_what_is_left_of_one() -> None:
    assert_same({"how": "lerp", "branches": BRANCHES, "weights": {"far": 0.3}}, 0.3 * FAR_OUT + 0.7 * NEAR_OUT)


def test_a_gate_is_the_sigmoid_of_a_parameter_of_each_head() -> None:
    logits = drawn(HEADS, seed=3)
    share = torch.sigmoid(logits)[:, None, None]
    mix = {"how": "gate", "branches": BRANCHES, "weights": {"near": "logits"}}
    assert_same(mix, share * NEAR_OUT + (1 - share) * FAR_OUT, {"logits": logits})


def test_branches_of_one_softmax_are_that_softmax() -> None:
    branches = {"near": {"mask": "causal & window(4)"}, "far": {"mask": "causal & ~window(4)"}}
    expected, total = reference(Q, K, V, "causal", return_lse=True)
    found, mixed_total = attend(Q, K, V, {"mix": {"how": "lse", "branches": branches}}, return_lse=True)
    assert_within_budget(found, expected, expected)
    assert_within_budget(mixed_total.double(), total, total)


def test_keys_that_two_branches_see_count_twice() -> None:
    mix = {"how": "lse", "branches": {"all": {"mask": "causal"}, "first": {"mask": "causal & sinks(1)"}}}
    scores = SCORES.masked_fill(DISTANCE < 0, -math.inf)
    scores[..., 0] += math.log(2)
    assert_same(mix, scores.softmax(-1) @ ALL_V)


def test_a_softmax_and_features_share_one_denominator_as_in_lolcats() -> None:
    factor = torch.rand(HEADS, 1, 1, dtype=torch.float64)
    exponentials = factor * (SOFT - SOFT.amax(-1, keepdim=True)).exp()
    expected = (exponentials @ ALL_V + WEIGHTS @ ALL_V) / (exponentials + WEIGHTS).sum(-1, keepdim=True)
    mix = {"how": "shared_denominator", "branches": BRANCHES, "weights": {"near": "factor"}}
    assert_same(mix, expected, {"factor": factor[:, 0, 0]})


def test_linear_and_softmax_branches_are_weighed_by_what_their_weights_sum_to() -> None:
    exponentials = SOFT.exp()
    mass = WEIGHTS.sum(-1, keepdim=True) + 1e-6
    share = mass / (mass + exponentials.sum(-1, keepdim=True))
    assert_same({"how": "lse", "branches": BRANCHES}, share * FAR_OUT + (1 - share) * NEAR_OUT)


def test_slots_beside_a_mix_hold_for_every_branch() -> None:
    branches = {"near": {"mask": "window(4)"}, "far": {"feature": "elu_one"}}
    beside = {"mask": "causal", "scale": 0.5, "mix": {"how": "sum", "branches": branches}}
    inner = {"near": {"mask": "window(4)", "scale": 0.5}, "far": {"mask": "causal", "feature": "elu_one", "scale": 0.5}}
    assert variant_of(beside) == variant_of({"mix": {"how": "sum", "branches": inner}})


def test_heads_may_mix_while_others_do_not() -> None:
    variant = {"heads": {"0:2": {"mix": {"how": "sum", "branches": BRANCHES}}, "rest": {"mask": "causal & window(4)"}}}
    expected = torch.cat([(NEAR_OUT + FAR_OUT)[:, :2], NEAR_OUT[:, 2:]], dim=1)
    found = attend(Q, K, V, variant)
    assert isinstance(found, Tensor)
    assert_within_budget(found, expected, expected)


@pytest.mark.parametrize("run", [attend, reference])
def test_heads_that_mix_by_log_sum_exp_have_one_only_where_it_is_asked_for(run: Callable[..., Tensor]) -> None:
    near, far = {"mask": "causal & window(4)"}, {"mask": "causal & ~window(4)"}
    variant = {"heads": {"1": {"mix": {"how": "lse", "branches": {"near": near, "far": far}}}, "rest": near}}
    whole = SCORES.masked_fill(DISTANCE < 0, -math.inf)
    expected, total = NEAR_OUT.clone(), SOFT.logsumexp(-1)
    expected[:, 1], total[:, 1] = (whole.softmax(-1) @ ALL_V)[:, 1], whole.logsumexp(-1)[:, 1]
    assert_within_budget(run(Q, K, V, variant), expected, expected)
    found, found_total = run(Q, K, V, variant, return_lse=True)
    assert_within_budget(found, expected, expected)
    assert_within_budget(found_total.double(), total, total)


MIXES = {
    "sum": {"how": "sum", "branches": BRANCHES, "weights": {"far": "slopes"}},
    "lse": {"how": "lse", "branches": BRANCHES},
    "shared": {"how": "shared_denominator", "branches": BRANCHES, "weights": {"near": "slopes"}},
}


@pytest.mark.parametrize("name", MIXES)
def test_mixes_compute_what_they_mean_with_gradients(name: str) -> None:
    variant = variant_of({"mix": MIXES[name]})
    tables = {"slopes": torch.tensor([0.5, 0.8, 0.3, 0.9], dtype=torch.float64)}
    check_variant(variant, tables={name: tables[name] for name in variant.tables()})


@pytest.mark.parametrize("name", MIXES)
def test_mixes_and_features_survive_being_written_down(name: str) -> None:
    for slots in ({"mix": MIXES[name]}, {"heads": {"0": {"mix": MIXES[name]}, "1": {"feature": "hedgehog"}}}):
        variant = variant_of(slots)
        assert wire.read(wire.write(variant)) == variant


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ({"how": "lse", "branches": {"a": {"feature": "relu", "normalizer": "linear(none)"}}}, "not normalized"),
        ({"how": "lse", "branches": BRANCHES, "weights": -0.5}, "at least 0"),
        ({"how": "sum", "branches": {}}, "expected branches by name"),
        ({"how": "lerp", "branches": BRANCHES}, "two branches, one of which has a weight"),
        ({"how": "gate", "branches": BRANCHES, "weights": 0.5}, "two branches, one of which has a weight"),
        ({"how": "sum", "branches": {"a": {"mix": {"how": "sum", "branches": BRANCHES}}}}, "no branches of its own"),
        ({"how": "sum", "branches": {"a": {"heads": {"0": "exact"}}}}, "no heads"),
    ],
)
def test_what_cannot_be_mixed_is_refused(variant: object, said: str) -> None:
    with pytest.raises((PolicyError, ShapeError, LanguageError), match=said):
        attend(Q, K, V, {"mix": variant})


def test_a_sum_has_no_log_sum_exp() -> None:
    with pytest.raises(ShapeError, match="have no log-sum-exp"):
        attend(Q, K, V, {"mix": {"how": "sum", "branches": BRANCHES}}, return_lse=True)


@pytest.mark.parametrize(
    ("target", "slots", "said"),
    [
        ("cpp", {"feature": "elu_one", "mask": "causal & window(4)"}, "carry `feature`"),
        ("flex", {"feature": "elu_one", "mask": "causal & window(4)"}, "carry `feature`"),
        ("flex", {"mix": MIXES["lse"]}, "carry `(feature|mix)`"),
        ("flex", {"feature": "identity", "normalizer": "linear(subtract)"}, "count the keys that a query sees"),
    ],
)
def test_kernels_that_carry_no_features_and_mixes_say_so(target: str, slots: Mapping[str, object], said: str) -> None:
    with pytest.raises(ShapeError, match=f"the target {target}: it does not {said}"):
        attend(Q.float(), K.float(), V.float(), slots, target=target)  # type: ignore[arg-type]
