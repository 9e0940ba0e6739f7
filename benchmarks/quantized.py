"""Attention from codes on a CPU, beside our own bfloat16 and SDPA: time, all encoding included, and error.

    python benchmarks/quantized.py FOLDER [--rounds 7]

Writes `quantized.json` and `quantized.md` to FOLDER. The shapes were fixed before anything was measured: 8 heads of 64, one
thread. Times are processor time of the thread, the least of some rounds that are interleaved. `shifted`: four channels of k
moved by eight standard deviations. One query meets a cache that holds codes: that of the cases named `decode`, where new keys
are encoded once, when they come, and no encoding is counted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import attn_compiler as attn
from _tables import features, markdown, processor, write_json

CASES = (("causal", 4096), ("causal & window(1024)", 4096), ("causal & window(256)", 4096), ("causal", 1024))
STORAGES = {
    "int8 q·k, int8 p·v": {"qk": "int8", "pv": "int8"},
    "the same, k smoothed": {"qk": {"type": "int8", "smooth": True}, "pv": "int8"},
    "int8 q·k, bf16 p·v": {"qk": {"type": "int8", "smooth": True}, "pv": "bf16"},
}
DECODED = (  # kv heads, keys, mask
    (8, 32768, "causal"), (2, 32768, "causal"), (8, 4096, "causal"), (8, 1024, "causal"), (8, 256, "causal"),
    (8, 32768, "causal & window(1024)"), (8, 32768, "causal & window(256)"),
)  # fmt: skip
CODES = ("int8", "int4", "fp8_e4m3")
SHIFTED = (3, 17, 40, 63)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--rounds", type=int, default=7)
    given = options.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    rows = [row for mask, length in CASES for row in measured(mask, length, given.rounds)]
    decoded = [row for kv_heads, length, mask in DECODED for row in decoding(kv_heads, length, mask, 5 * given.rounds)]
    given.folder.mkdir(parents=True, exist_ok=True)
    write_json(given.folder / "quantized.json", {"rows": rows, "decode": decoded})
    tables = f"{markdown(rows)}\n## decode\n\n{markdown(decoded)}"
    text = f"# Attention from codes\n\nOn {processor()} ({features()}), torch {torch.__version__}, one thread.\n\n{tables}"
    (given.folder / "quantized.md").write_text(text)
    print(tables)


def measured(mask: str, length: int, rounds: int) -> list[dict[str, object]]:
    """A row for each way of holding the operands, which come in bfloat16."""
    drawn = torch.randn(3, 1, 8, length, 64, generator=torch.Generator().manual_seed(0))
    q, k, v = drawn.bfloat16()
    shifted = k.clone()
    shifted[..., SHIFTED] += 8
    runs: dict[str, Callable[[], Tensor]] = {"SDPA fp32": lambda: F.scaled_dot_product_attention(*drawn, is_causal=True)}
    runs["own bf16"] = lambda: attend(q, k, v, {"mask": mask})
    for name, storage in STORAGES.items():
        runs[name] = lambda storage=storage: attend(q, k, v, {"mask": mask, "storage": storage})  # type: ignore[misc]
    times = interleaved(runs, rounds)
    rows = []
    for name, slots in (("own bf16", {}), *((name, {"storage": storage}) for name, storage in STORAGES.items())):
        errors = [relative(attend(q, keys, v, {"mask": mask, **slots}), q, keys, v, mask) for keys in (k, shifted)]
        rows.append(
            {
                "mask": mask, "tokens": length, "held": name, "ms": f"{1e3 * times[name]:.1f}",
                "x own bf16": f"{times['own bf16'] / times[name]:.2f}", "x SDPA fp32": f"{times['SDPA fp32'] / times[name]:.2f}",
                "error": f"{errors[0]:.1e}", "error, shifted": f"{errors[1]:.1e}",
            }
        )  # fmt: skip
    return rows


def decoding(kv_heads: int, length: int, mask: str, rounds: int) -> list[dict[str, object]]:
    """A row for each way to hold the cache that one query of 8 heads meets."""
    q, (k, v) = torch.randn(1, 8, 1, 64), torch.randn(2, 1, kv_heads, length, 64, generator=torch.Generator().manual_seed(0))
    halves = q.bfloat16(), k.bfloat16(), v.bfloat16()
    held = {name: (attn.encode(k, name), attn.encode(v, name)) for name in CODES}
    runs: dict[str, Callable[[], Tensor]] = {"SDPA fp32": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)}
    runs |= {"own fp32": lambda: attend(q, k, v, {"mask": mask}), "own bf16": lambda: attend(*halves, {"mask": mask})}
    for name, codes in held.items():
        runs[name] = lambda codes=codes: attend(q, *codes, {"mask": mask})  # type: ignore[misc]
    times = interleaved(runs, rounds)
    sizes = {"SDPA fp32": k.nbytes, "own fp32": k.nbytes, "own bf16": k.nbytes // 2} | {x: held[x][0].nbytes for x in CODES}
    exact = attn.reference(q, k, v, mask)
    assert isinstance(exact, Tensor)
    return [
        {
            "mask": mask, "kv heads": kv_heads, "keys": length, "cache": name, "MiB": f"{2 * sizes[name] / 2**20:.1f}",
            "ms": f"{1e3 * times[name]:.3f}", "x own bf16": f"{times['own bf16'] / times[name]:.2f}",
            "x SDPA fp32": f"{times['SDPA fp32'] / times[name]:.2f}",
            "error": "" if name == "SDPA fp32" else f"{float((run() - exact).norm() / exact.norm()):.1e}",
        }
        for name, run in runs.items()
    ]  # fmt: skip


def attend(q: Tensor, k: Tensor | attn.Codes, v: Tensor | attn.Codes, slots: dict[str, object]) -> Tensor:
    out = attn.attend(q, k, v, slots, target="cpp")
    assert isinstance(out, Tensor)
    return out


def relative(found: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: str) -> float:
    """The relative error of the first head, against the operands as they come."""
    exact = attn.reference(q[:, :1], k[:, :1], v[:, :1], mask)
    assert isinstance(exact, Tensor)
    exact, found = exact.double(), found[:, :1].double()
    return float((exact - found).norm() / exact.norm())


def interleaved(runs: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """The least time of each."""
    best = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            best[name] = min(best[name], time.thread_time() - start)
    return best


if __name__ == "__main__":
    main()
