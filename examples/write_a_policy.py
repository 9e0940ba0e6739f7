"""A policy is a text: compile a model with one, and see which tokens it changes."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attn_compiler as attn

POLICY = """
version: 1
because: The last layer looks back 32 tokens, and at the first four.
rules:
  - {match: {kind: self, layers: -1}, attn: {mask: causal & (window(32) | sinks(4))}}
"""


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(3, 512, (1, 128))
    policy = attn.load_policy(POLICY)
    print(f"policy {policy.digest[:12]}")

    compiled = torch.compile(model, backend="attn", options={"policy": policy})
    with torch.no_grad():
        change = (compiled(tokens).logits - model(tokens).logits).abs().amax(dim=-1)[0]
    print(f"tokens that the window does not reach change by {change[:36].max():.1e}")
    print(f"the others by up to {change[36:].max():.1e}")


if __name__ == "__main__":
    main()
