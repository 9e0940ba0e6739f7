"""Every feature map, denominator and state against its published formula, written out here with matrices in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_compiler import attend, reference
from attn_compiler.errors import LanguageError, TableError
from attn_compiler.testing import assert_within_budget

HEADS, KV_HEADS, TOKENS, DIM = 4, 2, 11, 6
DISTANCE = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
CAUSAL = DISTANCE >= 0


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = drawn(2, HEADS, TOKENS, DIM), drawn(2, KV_HEADS, TOKENS, DIM, seed=1), drawn(2, KV_HEADS, TOKENS, 5, seed=2)
ALL_K, ALL_V = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (K, V))
TABLES = {"hedgehog_q": drawn(3, HEADS, DIM, 4, seed=3), "hedgehog_k": drawn(3, HEADS, DIM, 4, seed=4)}


def elu_one(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def taylor(x: Tensor) -> Tensor:
    """As in BASED: 1, x / d**(1/4), x xT / (sqrt(2) sqrt(d))."""
    square = (x[..., :, None] * x[..., None, :]).flatten(-2)
    return torch.cat([torch.ones_like(x[..., :1]), x / DIM**0.25, square / (math.sqrt(2) * math.sqrt(DIM))], dim=-1)


MAPS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "elu_one": elu_one,
    "relu": F.relu,
    "silu": F.silu,
    "softmax": lambda x: x.softmax(-1),
    "cosine": lambda x: x / x.norm(dim=-1, keepdim=True),
    "taylor(2)": taylor,
}


def assert_same(
    variant: Mapping[str, object], expected: Tensor, tables: Mapping[str, Tensor] | None = None, layer: int = 0
) -> None:
    """Both the target and the meaning are what is expected."""
    for run in (attend, reference):
        found = run(Q, K, V, variant, tables=tables, layer=layer)
        assert isinstance(found, Tensor)
        assert_within_budget(found, expected, expected)


@pytest.mark.parametrize("name", MAPS)
def test_a_feature_map_is_applied_to_queries_and_keys(name: str) -> None:
    weights = MAPS[name](Q) @ MAPS[name](ALL_K).mT * CAUSAL
    assert_same({"feature": name, "mask": "causal", "normalizer": "linear(none)"}, weights @ ALL_V)


def favor(x: Tensor, projection: Tensor) -> Tensor:
    scaled = x / DIM**0.25
    return (scaled @ projection - scaled.square().sum(-1, keepdim=True) / 2).exp()


def test_favor_is_made_of_positive_random_features() -> None:
    projection = drawn(3, HEADS, DIM, 16, seed=5)
    weights = favor(Q, projection[1]) @ favor(ALL_K, projection[1]).mT * CAUSAL / 16
    expected = weights @ ALL_V / (weights.sum(-1, keepdim=True) + 1e-6)
    assert_same({"feature": "favor(16)", "mask": "causal"}, expected, {"favor": projection}, layer=1)


def test_in_the_mean_the_product_of_favor_features_is_an_exponential() -> None:
    """Within five standard errors of it."""
    q, k, draws = Q[0, 0] / 2, K[0, 0] / 2, 4096
    projection = drawn(DIM, draws, seed=5)
    each = favor(q, projection)[:, None] * favor(k, projection)[None]
    error = each.std(-1) / draws**0.5
    assert ((each.mean(-1) - (q @ k.mT / math.sqrt(DIM)).exp()).abs() <= 5 * error).all()


def test_the_product_of_taylor_features_is_the_series_of_an_exponential() -> None:
    scaled = Q @ ALL_K.mT / math.sqrt(DIM)
    weights = 1 + scaled + scaled**2 / 2
    assert_same(
        {"feature": "taylor", "normalizer": "linear(eps=1e-12)"}, weights @ ALL_V / (weights.sum(-1, keepdim=True) + 1e-12)
    )


def test_hedgehog_maps_each_query_head_by_its_own_weights_in_each_layer() -> None:
    def mapped(x: Tensor, weights: Tensor) -> Tensor:
        return torch.cat([(x @ weights).softmax(-1), (-x @ weights).softmax(-1)], dim=-1)

    q_side, k_side = (TABLES[name][2] for name in ("hedgehog_q", "hedgehog_k"))
    weights = mapped(Q, q_side) @ mapped(ALL_K, k_side).mT * CAUSAL
    expected = weights @ ALL_V / (weights.sum(-1, keepdim=True) + 1e-6)
    assert_same({"feature": "hedgehog", "mask": "causal"}, expected, TABLES, layer=2)


def test_weights_of_features_have_the_width_of_the_head() -> None:
    tables = {**TABLES, "hedgehog_k": drawn(HEADS, DIM + 1, 4)}
    with pytest.raises(TableError, match=r'"hedgehog_k" maps vectors of 6 numbers, so it is \[..., 6, features\]'):
        attend(Q, K, V, {"feature": "hedgehog"}, tables=tables)


WEIGHTS = elu_one(Q) @ elu_one(ALL_K).mT


@pytest.mark.parametrize(
    ("denominator", "expected"),
    [
        ("linear", WEIGHTS @ ALL_V / (WEIGHTS.sum(-1, keepdim=True) + 1e-6)),
        ("linear(sum, eps=0.5)", WEIGHTS @ ALL_V / (WEIGHTS.sum(-1, keepdim=True) + 0.5)),
        ("linear(none)", WEIGHTS @ ALL_V),
        ("linear(clamp(100))", WEIGHTS @ ALL_V / WEIGHTS.sum(-1, keepdim=True).clamp(min=100)),
        ("linear(mean, eps=1e-4)", (WEIGHTS @ ALL_V / TOKENS) / (WEIGHTS.mean(-1, keepdim=True) + 1e-4)),
    ],
)
def test_denominators_are_those_of_their_papers(denominator: str, expected: Tensor) -> None:
    assert_same({"feature": "elu_one", "normalizer": denominator}, expected)


def test_inline_attention_shifts_its_weights_so_that_they_sum_to_one() -> None:
    scale = DIM**-0.5
    centered = ALL_K - ALL_K.mean(dim=-2, keepdim=True)
    weights = scale * Q @ centered.mT / TOKENS + 1 / TOKENS
    assert_within_budget(weights.sum(-1), torch.ones_like(weights.sum(-1)), torch.ones_like(weights.sum(-1)))
    assert_same({"feature": "identity", "scale": "1 / sqrt(dim)", "normalizer": "linear(subtract)"}, weights @ ALL_V)


def test_means_are_of_the_keys_that_a_query_sees() -> None:
    seen = torch.arange(1, TOKENS + 1)[:, None]
    weights = WEIGHTS * CAUSAL
    expected = (weights @ ALL_V / seen) / (weights.sum(-1, keepdim=True) / seen + 0.1)
    assert_same({"feature": "elu_one", "mask": "causal", "normalizer": "linear(mean, eps=0.1)"}, expected)


def test_a_scale_counts_only_where_it_is_set() -> None:
    plain = F.relu(Q) @ F.relu(ALL_K).mT
    assert_same({"feature": "relu", "normalizer": "linear(none)"}, plain @ ALL_V)
    assert_same({"feature": "relu", "scale": 0.25, "normalizer": "linear(none)"}, 0.25 * plain @ ALL_V)


def test_features_do_not_change_what_dim_means() -> None:
    weights = taylor(Q) @ taylor(ALL_K).mT
    assert_same({"feature": "taylor", "scale": "1 / dim", "normalizer": "linear(none)"}, weights / DIM @ ALL_V)


def test_a_softmax_may_follow_features() -> None:
    scores = elu_one(Q) @ elu_one(ALL_K).mT
    assert_same({"feature": "elu_one", "normalizer": "softmax"}, scores.softmax(-1) @ ALL_V)


def test_a_state_decays_with_distance_for_each_head() -> None:
    slopes = torch.tensor([0.1, 0.3, 0.5, 0.9], dtype=torch.float64)
    decay = torch.exp(-slopes[:, None, None] * DISTANCE) * CAUSAL
    variant = {"feature": "silu", "state": "decay(slopes)", "mask": "causal", "normalizer": "linear(none)"}
    assert_same(variant, (F.silu(Q) @ F.silu(ALL_K).mT * decay) @ ALL_V, {"slopes": slopes})


def test_a_scalar_gate_is_the_product_of_the_gates_between_two_tokens() -> None:
    gates = torch.sigmoid(drawn(2, HEADS, TOKENS, seed=5))
    between = torch.ones(2, HEADS, TOKENS, TOKENS, dtype=torch.float64)
    for i in range(TOKENS):
        for j in range(i):
            between[:, :, i, j] = gates[:, :, j + 1 : i + 1].prod(-1)
    expected = (WEIGHTS * between * CAUSAL) @ ALL_V
    variant = {"feature": "elu_one", "state": "gate(scalar)", "mask": "causal", "normalizer": "linear(none)"}
    found = attend(Q, K, V, variant, tables={"gate": gates.log().cumsum(-1)})
    assert isinstance(found, Tensor)
    assert_within_budget(found, expected, found)
    assert (found - expected).abs().max() < 1e-12


def test_what_a_site_adds_to_its_scores_has_no_place_in_linear_attention() -> None:
    bias = drawn(1, HEADS, TOKENS, TOKENS)
    with pytest.raises(LanguageError, match="set `score`"):
        attend(Q, K, V, {"feature": "elu_one"}, bias=bias)
    found = attend(Q, K, V, {"feature": "elu_one", "score": "score"}, bias=bias)
    expected = attend(Q, K, V, {"feature": "elu_one"})
    assert isinstance(found, Tensor)
    assert isinstance(expected, Tensor)
    assert torch.equal(found, expected)
