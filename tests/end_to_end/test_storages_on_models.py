"""A policy with a storage on a whole model: what it computes, what it learns, what the report says."""

from __future__ import annotations

import pytest
import torch
import transformers

import attn_compiler as attn

HELD = {"qk": {"type": "fp8_e4m3", "smooth": True}, "pv": "int8", "kv_cache": "fp8_e4m3"}
POLICY = {"version": 1, "rules": [{"match": {"layers": "0"}, "attn": {"storage": HELD}}]}


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, vocab_size=97
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_a_storage_changes_a_model_a_little_and_the_report_says_so(model: torch.nn.Module) -> None:
    tokens = torch.arange(40)[None]
    compiled = torch.compile(model, backend="attn", options={"policy": POLICY})
    with torch.no_grad():
        exact, found = model(tokens).logits, compiled(tokens).logits
    error = (found - exact).norm() / exact.norm()
    assert 1e-5 < error < 0.1
    report = attn.explain(model, (tokens,), policy=POLICY)
    assert [d.outcome for d in report.decisions] == ["approximate", "exact"]
    assert "held in fp8_e4m3, per token, smoothed" in str(report)


def test_a_model_learns_through_what_is_rounded(model: torch.nn.Module) -> None:
    tokens = torch.arange(40)[None]
    compiled = torch.compile(model, backend="attn", options={"policy": POLICY})
    weight = model.get_parameter("model.layers.0.self_attn.k_proj.weight")
    exact, found = (torch.autograd.grad(one(tokens, labels=tokens).loss, weight)[0].flatten() for one in (model, compiled))
    assert torch.nn.functional.cosine_similarity(found, exact, dim=0) > 0.95
    assert not torch.allclose(found, exact, rtol=1e-5)
