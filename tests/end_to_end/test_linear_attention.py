"""Policies that make attention linear, on models: what is computed is what the model computes when it is rewritten by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.testing import assert_within_budget
from end_to_end.by_hand import ByHand, all_became, by_hand, check, check_training, everywhere, with_weights
from end_to_end.models import double, like_llama, llama, near, tokens

pytestmark = pytest.mark.usefixtures("quick")
LAYERS = ["layers.0.self_attn", "layers.1.self_attn"]
TOKENS, HEADS, DIM, WINDOW = 24, 4, 8, 6
ALL = everywhere(torch.ones((), dtype=torch.bool))


def policy(**attn: object) -> dict[str, object]:
    return {"version": 1, "rules": [{"match": {"kind": "self"}, "attn": attn}]}


class Elu(ByHand):
    """elu + 1, over its sum."""

    def formula(self, q: Tensor, k: Tensor, v: Tensor, scores: Tensor, visible: Tensor) -> Tensor:
        weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT * visible
        return weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)


class Fading(ByHand):
    """silu without a denominator, fading with distance, faster in each head."""

    def formula(self, q: Tensor, k: Tensor, v: Tensor, scores: Tensor, visible: Tensor) -> Tensor:
        slopes = torch.arange(1, HEADS + 1, dtype=q.dtype)[:, None, None] / 8
        distance = (torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])).abs()
        return (F.silu(q) @ F.silu(k).mT * torch.exp(-slopes * distance) * visible) @ v


MAPS = {
    name: np.random.default_rng(seed).normal(size=(2, HEADS, DIM, DIM)) for seed, name in enumerate(("hedgehog_q", "hedgehog_k"))
}
SHARE = np.linspace(-1, 1, 2 * HEADS).reshape(2, HEADS)


class Lolcats(ByHand):
    """A softmax over the latest keys and learned features of the others share one denominator."""

    def formula(self, q: Tensor, k: Tensor, v: Tensor, scores: Tensor, visible: Tensor) -> Tensor:
        layer = self.count - 1
        of_q, of_k = (torch.tensor(MAPS[name][layer]).to(q) for name in MAPS)
        latest = near(q.shape[2], WINDOW, causal=True)
        mapped = [torch.cat([(x @ w).softmax(-1), (-x @ w).softmax(-1)], -1) for x, w in ((q, of_q), (k, of_k))]
        far = mapped[0] @ mapped[1].mT * (visible & ~latest)
        shown = scores.masked_fill(~(visible & latest), -math.inf)
        share = torch.sigmoid(torch.tensor(SHARE[layer]).to(q))[:, None, None]
        close = share * (shown - shown.amax(-1, keepdim=True)).exp()
        return (close + far) @ v / (close + far).sum(-1, keepdim=True)


def test_a_llama_whose_attention_became_linear() -> None:
    report = check(with_weights(llama()), like_llama(tokens(2, TOKENS)), policy(feature="elu_one"), ALL, Elu)
    all_became(report, "approximate", LAYERS)
    becomes = json.loads(report.to_json())["sites"][0]["becomes"]
    assert "linear[ Σ w·v / (Σ w + 1e−06) ]( φ(q)·φ(k) )" in str(becomes)


def test_a_llama_with_linear_attention_trains() -> None:
    check_training(with_weights(llama()).train(), like_llama(tokens(2, TOKENS)), policy(feature="elu_one"), ALL, Elu)


def test_a_llama_whose_state_decays_otherwise_in_each_head() -> None:
    fading = policy(feature="silu", state="decay((h + 1) / 8)", normalizer="linear(none)")
    check(with_weights(llama()), like_llama(tokens(2, TOKENS)), fading, ALL, Fading)


def look(model: nn.Module) -> Tensor:
    pixels = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(2))
    out = model(pixels.to(next(model.parameters()).dtype)).last_hidden_state
    assert isinstance(out, Tensor)
    return out


def test_a_vit_whose_attention_became_linear() -> None:
    from transformers import ViTConfig, ViTModel

    shape = {"image_size": 20, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = with_weights(ViTModel(ViTConfig(**shape, intermediate_size=32), add_pooling_layer=False))
    all_became(
        check(model, look, policy(feature="elu_one"), ALL, Elu), "approximate", ["layers.0.attention", "layers.1.attention"]
    )


def lolcats(folder: Path) -> Path:
    np.savez(folder / "trained.npz", share=SHARE, **MAPS)
    path = folder / "lolcats.yaml"
    path.write_text(
        "version: 1\nparameters: trained.npz\nrules:\n  - match: {kind: self}\n    attn:\n      mix:\n"
        "        how: shared_denominator\n        weights: {near: sigmoid(share)}\n        branches:\n"
        f"          near: {{mask: causal & window({WINDOW})}}\n"
        f"          far: {{mask: causal & ~window({WINDOW}), feature: hedgehog}}\n"
    )
    return path


def test_a_window_and_learned_features_share_a_denominator_in_a_llama(tmp_path: Path) -> None:
    report = check(with_weights(llama()), like_llama(tokens(2, TOKENS)), lolcats(tmp_path), ALL, Lolcats)
    all_became(report, "approximate", LAYERS)


def test_without_its_parameters_a_llama_stays_as_it_is_and_says_why() -> None:
    model = with_weights(llama())
    report = attn.explain(model, (tokens(1, TOKENS),), policy=policy(feature="hedgehog"))
    assert [refusal.reason for _, refusal in report.refusals] == [
        "it has parameters, hedgehog_k, hedgehog_q, which no `parameters:` of the policy hold"
    ] * 2


def test_a_long_llama_with_linear_attention_runs_on_a_kernel_of_its_own() -> None:
    report = check(
        with_weights(llama(max_position_embeddings=512)), like_llama(tokens(1, 256)), policy(feature="elu_one"), ALL, Elu
    )
    sites = json.loads(report.to_json())["sites"]
    assert [(site["target"], site["form"]) for site in sites] == [
        ("cpp", "a generated kernel, whose state stays in the cache")
    ] * 2


def test_lengths_may_change_from_call_to_call() -> None:
    model = with_weights(llama(max_position_embeddings=512))
    compiled = torch.compile(model, backend="attn", dynamic=True, options={"policy": policy(feature="elu_one")})
    with torch.no_grad():
        for length in (40, 200):
            run = like_llama(tokens(2, length))
            exact, plain = (by_hand(run, ALL, Elu)(one) for one in (double(model), model))
            assert_within_budget(run(compiled), exact, plain)
