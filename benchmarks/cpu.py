"""One attention on a CPU: generated kernels beside what PyTorch offers, interleaved in one process.

    python benchmarks/cpu.py FOLDER [--threads 1] [--rounds 7] [--only window] [--dtypes float32,bfloat16] [--peers]

Writes `cpu.json` and `cpu.md` to FOLDER. The shapes below were fixed before anything was measured. Dense SDPA is the yardstick:
causal where the case is, full otherwise. Cases that train are timed forward and backward.
`--peers` adds compiled flex_attention, SDPA with a mask, blocks of SDPA, and Longformer's chunks. Where heads differ, *ideal
mix* is what their parts would take: the time of each with all heads, by its share of them. Memory is what one call needs at
most, its results included.
"""

from __future__ import annotations

import argparse
import ctypes
import operator
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attn_compiler as attn
from _tables import features, markdown, processor, write_json
from attn_compiler.algebra.simplify import simplify
from attn_compiler.algebra.variant import Variant
from attn_compiler.runtime.reading import read_variant

HEADS, DIM = 8, 64
Run = Callable[[], Tensor]
Sees = Callable[[Tensor, Tensor], Tensor]


def near(window: int, step: int = 1) -> Sees:
    return lambda i, j: (i >= j) & (i - j < window) & ((i - j) % step == 0)


def in_grid(i: Tensor, j: Tensor) -> Tensor:
    """Within 3 of the nearest center that leaves the whole kernel inside a grid of 56 x 56."""
    rows, columns = (i // 56).clamp(3, 52) - j // 56, (i % 56).clamp(3, 52) - j % 56
    return (rows.abs() <= 3) & (columns.abs() <= 3)


@dataclass(frozen=True)
class Case:
    """A variant at a length; `causal` says what its yardstick hides."""

    name: str
    variant: object
    length: int
    causal: bool = True
    kv_heads: int = HEADS
    dim: int = DIM
    must: tuple[float, float] | None = None  # on AMD Zen 5, in float32 and bfloat16
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    sees: Sees | None = None  # the mask again, for those who take functions or tensors
    trains: bool = False  # whether a gradient is taken too
    dropout: float = 0.0
    queries: int | None = None  # the last ones, where they are fewer than the keys
    parts: Mapping[str, float] = field(default_factory=dict)  # of a mix of heads: their masks, and the share of each
    either_side: int | None = None  # how far a query sees, in the cases that Longformer's chunks can compute


def scattered(length: int, block: int, share: float) -> Tensor:
    """Which blocks of keys the blocks of queries see: some at random, and their own."""
    blocks = length // block
    chosen = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0)) < share - 1 / blocks
    return chosen | torch.eye(blocks, dtype=torch.bool)


def mixed(parts: Mapping[str, float]) -> dict[str, object]:
    """A variant whose heads follow masks in turn, the wider ones later."""
    stops = [round(HEADS * sum(list(parts.values())[: n + 1])) for n in range(len(parts))]
    starts = (0, *stops[:-1])
    heads = {f"{start}:{stop}": {"mask": mask} for mask, start, stop in zip(parts, starts, stops, strict=True)}
    return {"mask": "causal", "heads": heads}


GRID = {"geometry": [56, 56], "mask": "neighborhood(kernel=[7, 7])"}
SPARSE = scattered(4096, 64, 0.1)
TWO_WINDOWS = {"causal & window(256)": 0.5, "causal & window(1024)": 0.5}
SOME_DENSE = {"causal & window(128)": 0.5, "causal & window(512)": 0.25, "causal": 0.25}
CASES = (
    Case("window 256", "causal & window(256)", 4096, must=(11, 20), sees=near(256)),
    Case("window 128", "causal & window(128)", 4096, must=(18, 32), sees=near(128)),
    Case("window 1024", "causal & window(1024)", 16384, must=(12, 22), sees=near(1024)),
    Case("dilated, 128 keys 4 apart", "causal & window(512) & dilated(4)", 4096, must=(19, 30), sees=near(512, 4)),
    Case(
        "10 % of blocks of 64",
        "blocks(seen, 64)",
        4096,
        causal=False,
        must=(14, 23),
        tables={"seen": SPARSE},
        sees=lambda i, j: SPARSE[i // 64, j // 64],
    ),
    Case(
        "56 × 56, neighborhood of 7 × 7",
        GRID,
        3136,
        causal=False,
        must=(28, 48),
        sees=in_grid,
    ),
    Case("256 on either side", "window(257)", 4096, causal=False, sees=lambda i, j: (i - j).abs() <= 256, either_side=256),
    Case("dense causal", "causal", 4096, must=(1.8, 3.2), sees=near(1 << 30)),
    Case("dense", "all", 4096, causal=False),
    Case("streaming: window 256, 4 sinks", "causal & (window(256) | sinks(4))", 4096),
    Case("ALiBi, causal", {"mask": "causal", "score": "score + alibi()"}, 4096),
    Case("softcap, window 1024", {"mask": "causal & window(1024)", "score": "softcap(score, 50)"}, 4096),
    Case("window 256, 2 kv heads", "causal & window(256)", 4096, kv_heads=2),
    Case("window 256, heads of 128", "causal & window(256)", 4096, dim=128),
    Case("8 documents, causal", "causal & same(document)", 4096, tables={"document": torch.arange(4096)[None] // 512}),
    Case("window 256, training", "causal & window(256)", 4096, must=(6, 6), sees=near(256), trains=True),
    Case("window 256, training with dropout", "causal & window(256)", 4096, trains=True, dropout=0.1),
    Case("window 1024, training", "causal & window(1024)", 4096, sees=near(1024), trains=True),
    Case("dilated, 128 keys 4 apart, training", "causal & window(512) & dilated(4)", 4096, sees=near(512, 4), trains=True),
    Case("ALiBi, causal, training", {"mask": "causal", "score": "score + alibi()"}, 4096, trains=True),
    Case("window 256, 2 kv heads, training", "causal & window(256)", 4096, kv_heads=2, trains=True),
    Case("dense causal, training", "causal", 4096, sees=near(1 << 30), trains=True),
    Case("decoding, window 1024", "causal & window(1024)", 32768, causal=False, must=(100, 0), queries=1),
    Case("decoding", "causal", 32768, causal=False, must=(1.5, 0), queries=1),
    Case("decoding, 2 kv heads", "causal", 32768, causal=False, kv_heads=2, queries=1),
    Case("decoding 4 tokens, 2 kv heads", "all", 32768, causal=False, kv_heads=2, queries=4),
    Case("decoding, 1024 tokens", "causal", 1024, causal=False, queries=1),
    Case("dense causal, 128 tokens", "causal", 128),
    Case("dense causal, 512 tokens", "causal", 512),
    Case("by head: window 256 or 1024", mixed(TWO_WINDOWS), 4096, parts=TWO_WINDOWS),
    Case("by head: window 128, 512 or causal", mixed(SOME_DENSE), 4096, parts=SOME_DENSE),
    Case("by head: window 256 or 1024, training", mixed(TWO_WINDOWS), 4096, parts=TWO_WINDOWS, trains=True),
)


@dataclass(frozen=True)
class Result:
    """Median times in milliseconds by who took them, and how many times faster than the yardstick each is."""

    case: str
    dtype: str
    length: int
    must: float | None
    milliseconds: dict[str, float]
    ratios: dict[str, float]
    mebibytes: dict[str, float]  # that a call needs besides its operands, its results included


def runs(case: Case, dtype: torch.dtype, *, peers: bool) -> dict[str, Run]:
    """Everybody's way to compute a case; the yardstick first."""
    generator = torch.Generator().manual_seed(0)
    sizes = (HEADS, case.queries or case.length), (case.kv_heads, case.length), (case.kv_heads, case.length)
    drawn = (torch.randn(1, *size, case.dim, generator=generator).to(dtype) for size in sizes)
    q, k, v = (x.requires_grad_(case.trains) for x in drawn)
    tables, variant = dict(case.tables), replace(read(case), dropout=case.dropout)
    grouped, rate = case.kv_heads != HEADS, case.dropout
    found: dict[str, Run] = {
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, None, rate, is_causal=case.causal, enable_gqa=grouped),
        "cpp": lambda: attn.attend(q, k, v, variant, tables=tables, target="cpp", training=case.trains),
    }
    for part in case.parts:
        alone = read(replace(case, variant=part))
        found[part] = partial(attn.attend, q, k, v, alone, target="cpp", training=case.trains)
    if peers:
        found["torch"] = lambda: attn.attend(q, k, v, variant, tables=tables, target="torch", training=case.trains)
        if case.sees and case.length <= 8192:
            at = torch.arange(case.length)
            mask = case.sees(at[:, None], at[None])
            found["masked sdpa"] = lambda: F.scaled_dot_product_attention(q, k, v, mask, rate, enable_gqa=grouped)
        if case.sees and not case.trains:  # it has no gradients on a CPU
            found["flex"] = flex(q, k, v, case.sees)
        if case.either_side:
            found["longformer"] = longformer(q, k, v, case.either_side)
    above = torch.randn(q.shape, generator=generator).to(dtype)
    return {name: trained(run, (q, k, v), above) if case.trains else run for name, run in found.items()}


def trained(run: Run, leaves: tuple[Tensor, ...], above: Tensor) -> Run:
    """Forward and backward."""
    return lambda: torch.autograd.grad(run(), leaves, above)[0]


def read(case: Case) -> Variant:
    """The variant, read and simplified once, as a compiled model has it."""
    sizes = {
        "heads": HEADS,
        "kv_heads": case.kv_heads,
        "q_len": case.queries or case.length,
        "k_len": case.length,
        "head_dim": case.dim,
    }
    found = read_variant(case.variant, Variant(), **sizes, values=None, layer=0, layers=1)  # type: ignore[arg-type]
    return found.map(simplify)


def flex(q: Tensor, k: Tensor, v: Tensor, sees: Sees) -> Run:
    """PyTorch's compiler for masks, with a block mask made ahead."""
    length = q.shape[2]
    blocks = create_block_mask(lambda b, h, i, j: sees(i, j), None, None, length, length, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=blocks, enable_gqa=k.shape[1] != q.shape[1])  # type: ignore[return-value]


def longformer(q: Tensor, k: Tensor, v: Tensor, side: int) -> Run:
    """The overlapping chunks of transformers' Longformer, without its projections."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    sizes = {"hidden_size": HEADS * DIM, "num_attention_heads": HEADS, "attention_window": [2 * side]}
    chunks: Any = LongformerSelfAttention(LongformerConfig(**sizes), layer_id=0)
    by_token = [x.transpose(1, 2) for x in (q * q.shape[3] ** -0.5, k, v)]

    products, gathered = chunks._sliding_chunks_query_key_matmul, chunks._sliding_chunks_matmul_attn_probs_value  # noqa: SLF001

    def run() -> Tensor:
        weights = products(by_token[0], by_token[1], side).softmax(-1).to(v.dtype)
        found: Tensor = gathered(weights, by_token[2], side).transpose(1, 2)
        return found

    return run


def measure(case: Case, dtype: torch.dtype, rounds: int, *, peers: bool) -> Result:
    """Medians of interleaved rounds; each round runs long enough for a clock to see it."""
    ways = runs(case, dtype, peers=peers)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    mebibytes = {name: peak_mebibytes(run) for name, run in ways.items()} if COUNTERS.exists() else {}
    for _ in range(rounds):
        for name, run in ways.items():
            times[name].append(seconds(run))
    if case.parts:
        of_parts = zip(*(times.pop(part) for part in case.parts), strict=True)
        times["ideal mix"] = [sum(map(operator.mul, case.parts.values(), took)) for took in of_parts]
    yardstick = times["sdpa"]
    ratios = {name: statistics.median(a / b for a, b in zip(yardstick, own, strict=True)) for name, own in times.items()}
    must = case.must and case.must[dtype == torch.bfloat16]
    median = {name: statistics.median(own) * 1e3 for name, own in times.items()}
    return Result(case.name, str(dtype).removeprefix("torch."), case.length, must, median, ratios, mebibytes)


COUNTERS = Path("/proc/self/clear_refs")  # Linux forgets the peak of a process that writes a 5 there


def peak_mebibytes(run: Run) -> float:
    """How much memory a call needs at most; what others have freed is given back before."""
    ctypes.CDLL(None).malloc_trim(0)
    COUNTERS.write_text("5")
    before = resident("VmRSS")
    run()
    return (resident("VmHWM") - before) / 1024


def resident(what: str) -> int:
    """What the system says of this process's memory, in kibibytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def seconds(run: Run, least: float = 0.05) -> float:
    """The time of one call, from as many as take `least` seconds."""
    start, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < least or not count:
        run()
        count += 1
    return passed / count if count == 1 else (time.perf_counter() - start) / count


def row(result: Result, names: list[str]) -> dict[str, object]:
    """What a person reads of a result."""
    shown = {name: f"{result.ratios[name]:.2f}x" if name in result.ratios else "" for name in names if name != "sdpa"}
    took = {"SDPA": f"{result.milliseconds['sdpa']:.2f} ms", "cpp takes": f"{result.milliseconds['cpp']:.2f} ms"}
    took |= {f"{name}, MiB": f"{size:.1f}" for name, size in result.mebibytes.items() if name in ("sdpa", "cpp")}
    return {"case": f"{result.case} @{result.length}", "dtype": result.dtype, "must": result.must or "", **shown, **took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--peers", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.threads :])
    results = []
    for case in CASES:
        for name in options.dtypes.split(",") if any(part in case.name for part in options.only.split(",")) else ():
            with torch.set_grad_enabled(case.trains):
                results.append(measure(case, getattr(torch, name), options.rounds, peers=options.peers))
            print(results[-1], flush=True)
            torch.compiler.reset()
    options.folder.mkdir(parents=True, exist_ok=True)
    write_json(options.folder / "cpu.json", {"results": [asdict(result) for result in results]})
    names = list(dict.fromkeys(name for result in results for name in result.ratios))
    about = (
        f"{processor()} ({features()}), threads: {options.threads}, torch {torch.__version__}; times faster than dense SDPA\n\n"
    )
    (options.folder / "cpu.md").write_text(about + markdown([row(result, names) for result in results]))


if __name__ == "__main__":
    main()
