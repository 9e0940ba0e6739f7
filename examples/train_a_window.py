"""Trains a small language model through a window that a policy asks for, on the sources of the standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

POLICY = {"version": 1, "rules": [{"match": {"kind": "self"}, "attn": {"mask": "causal & window(32)"}}]}
LENGTH, ROWS, STEPS = 128, 4, 30


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    compiled = torch.compile(model, backend="attn", options={"policy": POLICY}, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = _text()
    losses = []
    for _ in range(STEPS):
        starts = torch.randint(len(text) - LENGTH, (ROWS,)).tolist()
        tokens = torch.stack([text[start : start + LENGTH] for start in starts])
        loss = compiled(tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.2f} → {losses[-1]:.2f} in {STEPS} steps, each token seeing the 32 newest")


def _text() -> torch.Tensor:
    """A few modules of the standard library, as bytes."""
    library = Path(sysconfig.get_path("stdlib"))
    names = ("argparse.py", "dataclasses.py", "inspect.py", "typing.py")
    return torch.tensor(list(b"\n".join((library / name).read_bytes() for name in names)))


if __name__ == "__main__":
    main()
