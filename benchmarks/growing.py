"""One token behind a long text: a cache that grows in place beside transformers' own, which copies what it holds for each token.

    python benchmarks/growing.py FOLDER

Two layers of a Llama with 8 heads of 64, compiled once, meet both caches in turn; of each the best run counts.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import attn_compiler as attn
from _tables import machine, markdown

LAYERS, HEADS, DIM, ROUNDS = 2, 8, 64, 60
LENGTHS, KV_HEADS, DTYPES = (1024, 8192, 32768), (8, 2), (torch.float32, torch.bfloat16)


def llama(kv_heads: int, dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=HEADS * DIM, intermediate_size=HEADS * DIM, num_attention_heads=HEADS, head_dim=DIM,
        num_key_value_heads=kv_heads, num_hidden_layers=LAYERS, max_position_embeddings=1 << 16, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


def filled(cache: Any, keys: torch.Tensor) -> Any:
    """The cache, given the same keys and values in every layer."""
    for layer in range(LAYERS):
        cache.update(keys, keys, layer)
    return cache


def seconds(model: nn.Module, cache: Any) -> float:
    """How long one token takes."""
    start = time.perf_counter()
    model(input_ids=torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
    return time.perf_counter() - start


def rows(kv_heads: int, dtype: torch.dtype) -> list[dict[str, str]]:
    from transformers import DynamicCache

    model, found = llama(kv_heads, dtype), list[dict[str, str]]()
    torch.compiler.reset()
    ours = [attn.cache(model) for _ in LENGTHS]
    model.forward = torch.compile(model.forward, backend="attn")  # type: ignore[method-assign]
    for length, cache in zip(LENGTHS, ours, strict=True):
        keys = torch.randn(1, kv_heads, length, DIM, dtype=dtype)
        caches = filled(DynamicCache(), keys), filled(cache, keys)
        times = [[seconds(model, cache) for cache in caches] for _ in range(ROUNDS + 5)][5:]
        theirs, mine = map(min, zip(*times, strict=True))
        found.append({
            "dtype": str(dtype).removeprefix("torch."), "kv heads": str(kv_heads), "tokens": str(length),
            "transformers' own ms": f"{1e3 * theirs:.2f}", "attn.cache ms": f"{1e3 * mine:.2f}",
            "ratio": f"{theirs / mine:.2f}",
        })  # fmt: skip
        print(markdown(found[-1:]).splitlines()[-1], flush=True)
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    with torch.no_grad():
        found = [row for dtype in DTYPES for kv_heads in KV_HEADS for row in rows(kv_heads, dtype)]
    said = ", ".join(f"{name} {value}" for name, value in machine().items())
    text = f"# One token behind a long text, its cache grown in place\n\n`python benchmarks/growing.py FOLDER`; {said}.\n\n"
    (folder / "growing.md").write_text(text + markdown(found))


if __name__ == "__main__":
    main()
