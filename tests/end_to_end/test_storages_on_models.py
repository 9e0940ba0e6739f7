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


ORDERED = {"geometry": [5, 8], "order": "axes(1, 0)", "storage": {"qk": {"type": "int4", "per": "block(12)"}}}


def test_blocks_of_a_model_are_cut_in_the_order_of_a_policy() -> None:
    """A row that is padded counts its tokens from the first valid one."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=1, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, vocab_size=97
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokens, padding = torch.arange(40)[None].expand(2, -1).clone(), 7
    seen = torch.ones_like(tokens)
    seen[1, :padding] = 0
    policy = {"version": 1, "rules": [{"attn": ORDERED}]}
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.k_proj.weight").mul_(50)
        exact = model(tokens, attention_mask=seen).logits[1, padding:]
        found = torch.compile(model, backend="attn", options={"policy": policy, "target": "torch"})(
            tokens, attention_mask=seen
        ).logits[1, padding:]
    assert 1e-5 < (found - exact).norm() / exact.norm() < 0.5
    report = str(attn.reports()[-1])
    assert "blocks of tokens  cut in order of" in report
    assert "5·((k − first_key:" in report
