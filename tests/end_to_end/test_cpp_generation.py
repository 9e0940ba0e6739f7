"""Text generation on generated kernels: the same tokens, and nothing compiled anew while a cache grows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.runtime import cpp, operator
from end_to_end.by_hand import ByHand, compiled_since, policy, with_weights

pytestmark = pytest.mark.usefixtures("quick")
NEW, STREAMING = 12, "causal & (window(6) | sinks(2))"


@pytest.fixture(autouse=True)
def _calls_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with models that are large enough."""
    monkeypatch.setattr(cpp, "_few_gain", lambda dtype, queries, keys: 2.0)


def llama(implementation: str = "sdpa") -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, attn_implementation=implementation, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return with_weights(LlamaForCausalLM(config))


def prompt() -> Tensor:
    return torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(5))


def generated(model: nn.Module, cache: str, padding: int = 0) -> Tensor:
    settings = {"cache_implementation": "static"} if cache == "static" else {}
    valid = torch.ones_like(prompt())
    valid[0, :padding] = 0
    out = model.generate(
        prompt(), attention_mask=valid, max_new_tokens=NEW, do_sample=False, disable_compile=True, **settings
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize(
    ("implementation", "cache", "padding"),
    [("sdpa", "dynamic", 0), ("sdpa", "static", 3), ("eager", "dynamic", 3), ("eager", "static", 3)],
)
def test_generated_kernels_generate_the_model_s_tokens(implementation: str, cache: str, padding: int) -> None:
    model = llama(implementation)
    expected, before = generated(model, cache, padding), attn.reports()
    model.forward = torch.compile(model.forward, backend="attn")  # type: ignore[method-assign]
    assert torch.equal(generated(model, cache, padding), expected)
    found = [decision for report in compiled_since(before) for decision in report.decisions]
    assert {decision.target for decision in found if decision.site.q_len != decision.site.k_len} == {"cpp"}


def test_with_a_policy_the_tokens_are_what_the_policy_means() -> None:
    model, tokens = llama(), prompt()
    place = torch.arange(tokens.shape[1] + NEW)
    distance = place[:, None] - place
    seen = (distance >= 0) & ((distance < 6) | (place < 2))
    for _ in range(NEW):
        length = tokens.shape[1]
        with torch.no_grad(), ByHand(lambda number, q, k, n=length: seen[:n, :n]):  # type: ignore[misc]
            logits = model(input_ids=tokens, use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    before = attn.reports()
    model.forward = torch.compile(model.forward, backend="attn", options={"policy": policy(STREAMING)})  # type: ignore[method-assign]
    assert torch.equal(generated(model, "dynamic"), tokens)
    assert {decision.target for report in compiled_since(before) for decision in report.decisions} == {"cpp"}


def test_a_growing_cache_compiles_nothing_anew() -> None:
    model = llama()
    model.forward = torch.compile(model.forward, backend="attn")  # type: ignore[method-assign]
    torch._dynamo.utils.counters.clear()
    generated(model, "dynamic")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    kernels = operator._decoding.cache_info().misses
    generated(model, "dynamic")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs <= 4
    assert operator._decoding.cache_info().misses == kernels
