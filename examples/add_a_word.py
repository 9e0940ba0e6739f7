"""A mask of your own: one file in a folder shaped like `patterns/`, and the policy language knows it."""

from __future__ import annotations

from pathlib import Path

import torch

import attn_compiler as attn


def main() -> None:
    attn.library.add(Path(__file__).parent / "words")  # holds masks/stairs.py

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 128, 32)
    mask = "stairs(32) & window(48)"
    difference = attn.attend(q, k, v, mask) - attn.reference(q, k, v, mask)
    print(f"{mask}\n  differs from its float64 meaning by {difference.abs().max():.1e}")


if __name__ == "__main__":
    main()
