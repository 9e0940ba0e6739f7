"""What attentions a model has, and what a policy would do to each, without running the model."""

from __future__ import annotations

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import attn_compiler as attn

POLICY = {
    "version": 1,
    "because": "The layers that see everything shall see the first tokens and the newest ones.",
    "rules": [
        {"match": {"layers": "1::2"}, "attn": {"mask": "causal & (window(64) | sinks(4))"}},
        {"match": {"layers": 0}, "attn": {"storage": {"qk": "int8"}}},  # nothing carries this yet: refused, with a reason
    ],
}


def main() -> None:
    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Gemma3ForCausalLM(config).eval()
    tokens = torch.randint(3, 512, (1, 256))
    print(attn.explain(model, kwargs={"input_ids": tokens, "use_cache": False}, policy=POLICY))


if __name__ == "__main__":
    main()
