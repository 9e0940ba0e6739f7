"""One attention by its meaning, without a model: the mask is a text, and the reference says what must come out."""

from __future__ import annotations

import torch

import attn_compiler as attn


def main() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 4, 256, 32)
    k, v = torch.randn(2, 1, 2, 256, 32)  # two query heads share a key head

    window = "causal & (window(64) | sinks(4))"
    out = attn.attend(q, k, v, window)
    meaning = attn.reference(q, k, v, window)
    print(f"{window}\n  differs from its float64 meaning by {_difference(out, meaning):.1e}")

    # The last query meets the last key, so one step of decoding needs no positions.
    step = attn.attend(q[:, :, -1:], k, v, window)
    print(f"one step of decoding\n  differs from the last row by {_difference(step, out[:, :, -1:]):.1e}")


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


if __name__ == "__main__":
    main()
