"""Ready policies of linear attention against the formulas of their papers, written out with matrices in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_compiler import attend, library
from attn_compiler.algebra.expr import k, q, true
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.resolve import asked_of
from attn_compiler.planning.site import Frame, Kind, Phase, Site
from attn_compiler.testing import assert_within_budget

HEADS, TOKENS, DIM, LAYERS = 4, 80, 6, 8
DISTANCE = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
CAUSAL = DISTANCE >= 0


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = (drawn(2, HEADS, TOKENS, DIM, seed=seed) for seed in range(3))


def variant_of(name: str, layer: int, *, causal: bool) -> Variant | Refusal:
    """What a ready policy makes of a plain attention in one layer of eight."""
    computes = Variant(mask=k <= q if causal else true)
    site = Site(
        "attn", Kind.SELF, Phase.PREFILL, layer, LAYERS, 2, HEADS, HEADS, TOKENS, TOKENS, DIM, DIM, "float64", computes, Frame(),
        TOKENS, TOKENS,
    )  # fmt: skip
    return asked_of(library.load_policy(name), site).variant


def same(name: str, expected: Tensor, layer: int = 0, *, causal: bool = True) -> None:
    variant = variant_of(name, layer, causal=causal)
    assert isinstance(variant, Variant)
    for target in ("torch", "reference"):
        found = attend(Q, K, V, variant, layer=layer, layers=LAYERS, target=target)  # type: ignore[arg-type]
        assert isinstance(found, Tensor)
        assert_within_budget(found, expected, expected)


@pytest.mark.parametrize("layer", [0, 3, 7])
def test_lightning_attention_fades_less_in_later_layers(layer: int) -> None:
    slopes = torch.tensor([2.0 ** (-8 * (h + 1) / HEADS) for h in range(HEADS)], dtype=torch.float64)
    rate = slopes * (1 - layer / (LAYERS - 1) + 1e-5)
    weights = F.silu(Q) @ F.silu(K).mT * torch.exp(-rate[:, None, None] * DISTANCE.abs()) * CAUSAL
    same("lightning", weights @ V, layer)


def test_retention_keeps_what_its_paper_says() -> None:
    gamma = 1 - 2.0 ** (-5 - torch.arange(HEADS, dtype=torch.float64))
    weights = Q @ K.mT / math.sqrt(DIM) * gamma[:, None, None] ** DISTANCE.abs() * CAUSAL
    same("retention", weights @ V)


def test_linfusion_divides_means_by_means() -> None:
    weights = (F.elu(Q) + 1) @ (F.elu(K) + 1).mT
    same("linfusion", (weights @ V / TOKENS) / (weights.mean(-1, keepdim=True) + 1e-4), causal=False)


def test_inline_attention_is_a_mean_that_the_query_shifts() -> None:
    scale, mean_k, mean_v = DIM**-0.5, K.mean(-2, keepdim=True), V.mean(-2, keepdim=True)
    expected = scale / TOKENS * Q @ (K.mT @ V) + (1 - scale * Q @ mean_k.mT) * mean_v
    same("inline", expected, causal=False)


def test_based_is_linear_in_every_fifth_layer_and_looks_near_in_the_next() -> None:
    scaled = Q @ K.mT / math.sqrt(DIM)
    weights = (1 + scaled + scaled**2 / 2) * CAUSAL
    same("based", weights @ V / (weights.sum(-1, keepdim=True) + 1e-12), layer=6)
    seen = CAUSAL & (DISTANCE < 64)
    same("based", scaled.masked_fill(~seen, -math.inf).softmax(-1) @ V, layer=7)
    same("based", scaled.masked_fill(~CAUSAL, -math.inf).softmax(-1) @ V, layer=3)


@pytest.mark.parametrize("name", ["hedgehog", "lolcats"])
def test_policies_whose_parameters_nobody_trained_are_refused(name: str) -> None:
    refused = variant_of(name, 0, causal=True)
    assert isinstance(refused, Refusal)
    assert refused.reason == f"it has parameters, hedgehog_k, hedgehog_q, which {name}.safetensors does not hold"
