"""Generated Triton kernels on a GPU: first whether they are right there, then how fast they are beside what PyTorch offers.

    python benchmarks/gpu.py FOLDER [--rounds 20] [--seeds 120] [--only window]
    TRITON_INTERPRET=1 python benchmarks/gpu.py FOLDER --dry     on a CPU: every step at tiny shapes, no numbers worth reading

Writes `gpu.json` and `gpu.md` to FOLDER. The shapes below were fixed before anything was measured. TFLOP/s count pairs that see
each other, and nothing else; a backward pass counts 2.5 forward passes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attn_compiler as attn
from _tables import markdown, write_json
from attn_compiler.errors import ShapeError
from attn_compiler.testing import Case, assert_case, random_case

Run = Callable[[], object]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Shape:
    """One attention to be timed; `share` of all pairs see each other."""

    name: str
    variant: object
    length: int
    share: float
    dim: int = 128
    heads: int = 16
    kv_heads: int = 16
    queries: int | None = None  # the last ones, where they are fewer than the keys
    sees: Callable[[Tensor, Tensor], Tensor] | None = None  # the mask again, for flex_attention
    trains: bool = False


def near(window: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda i, j: (i >= j) & (i - j < window)


def within(window: int, length: int) -> float:
    """The share of pairs that a causal window shows."""
    return window / length * (1 - window / (2 * length))


PER_HEAD = {"mask": "causal", "heads": {"0:8": {"mask": "causal & window(256)"}, "8:16": {"mask": "causal & window(1024)"}}}
GRID = {"geometry": [128, 128], "mask": "neighborhood([13, 13])"}
SHAPES = (
    Shape("dense causal", "causal", 16384, 0.5, sees=near(1 << 30), trains=True),
    Shape("dense causal, heads of 64", "causal", 16384, 0.5, dim=64, sees=near(1 << 30), trains=True),
    Shape("window 1024", "causal & window(1024)", 16384, within(1024, 16384), sees=near(1024), trains=True),
    Shape("window 4096", "causal & window(4096)", 32768, within(4096, 32768), sees=near(4096)),
    Shape("window 1024, 4 kv heads", "causal & window(1024)", 16384, within(1024, 16384), kv_heads=4),
    Shape("streaming: window 1024, 4 sinks", "causal & (window(1024) | sinks(4))", 16384, within(1024, 16384)),
    Shape("dilated, 1024 keys 4 apart", "causal & dilated(4) & window(4096)", 16384, within(4096, 16384) / 4),
    Shape("every tenth block of 128", "strided(128, 10)", 16384, 0.1),
    Shape(
        "128 × 128, neighborhood of 13 × 13",
        {"geometry": [128, 128], "mask": "neighborhood([13, 13])"},
        16384,
        169 / 16384,
        dim=64,
    ),
    Shape("windows of 256 and 1024, by head", PER_HEAD, 16384, (within(256, 16384) + within(1024, 16384)) / 2),
    Shape("ALiBi, causal", {"mask": "causal", "score": "score + alibi"}, 8192, 0.5),
    Shape("decoding", "causal", 32768, 1.0, kv_heads=4, queries=1),
    Shape("decoding, window 1024", "causal & window(1024)", 32768, 1024 / 32768, kv_heads=4, queries=1),
)


def main() -> None:
    options = arguments()
    device = "cpu" if options.dry else "cuda"
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    checked = correctness(device, options.seeds)
    print(f"right in {checked['right']} of {checked['carried']} random calls on {device}", *checked["wrong"], sep="\n")
    ceilings = {} if options.dry else {"matmul TFLOP/s": matmul_ceiling(), "copy GB/s": copy_ceiling()}
    rows = []
    for shape in SHAPES:
        if options.only in shape.name:
            small = replace(shape, length=16, variant="causal", dim=16, heads=2, kv_heads=2) if options.dry else shape
            rows += timings(small, device, options.rounds)
            print(markdown(rows[-2:] if shape.trains else rows[-1:]), flush=True)
    name = "an interpreter: these are no timings" if options.dry else torch.cuda.get_device_name()
    write_json(folder / "gpu.json", {"device": name, "checked": checked, "ceilings": ceilings, "rows": rows})
    text = f"# Kernels on a GPU\n\n{name}; {checked}; {ceilings}. Milliseconds.\n\n{markdown(rows)}"
    (folder / "gpu.md").write_text(text, encoding="utf-8")


def correctness(device: str, seeds: int) -> dict[str, Any]:
    """Random variants against the float64 reference, forward and backward, and their last queries as while decoding."""
    carried, wrong = 0, []
    for seed, few in product(range(seeds), (False, True)):
        case = on_device(random_case(seed), device)
        try:
            carried += 1
            with torch.set_grad_enabled(not few):
                assert_case(case.last(1 + seed % 16) if few else case, DTYPES[seed % 3], "triton")
        except ShapeError:
            carried -= 1
        except AssertionError as failure:
            wrong.append(f"seed {seed}{', few queries' if few else ''}: {failure}")
    return {"carried": carried, "right": carried - len(wrong), "wrong": wrong}


def on_device(case: Case, device: str) -> Case:
    positions = case.q_positions.to(device) if isinstance(case.q_positions, Tensor) else case.q_positions
    tables = {name: table.to(device) for name, table in case.tables.items()}
    q, k, v = (x.to(device) for x in (case.q, case.k, case.v))
    return replace(case, q=q, k=k, v=v, tables=tables, q_positions=positions)


def timings(shape: Shape, device: str, rounds: int) -> list[dict[str, object]]:
    """One row for the forward pass, and one for the backward pass of what trains."""
    found = []
    for backward in (False, True)[: 1 + shape.trains]:
        runs = {name: step(run, backward) for name, run in attentions(shape, device, backward).items()}
        times = interleaved({name: run for name, run in runs.items() if works(run)}, device, rounds)
        queries = shape.queries or shape.length
        work = 4 * shape.heads * queries * shape.length * shape.share * shape.dim * (2.5 if backward else 1.0)
        row: dict[str, object] = {"case": f"{shape.name}{', backward' if backward else ''}"}
        row |= {name: f"{times[name]:.3f}" if name in times else "–" for name in runs}
        row |= {"TFLOP/s": "–", "best peer / ours": "–"}
        best = min((t for name, t in times.items() if name != "triton"), default=float("nan"))
        if "triton" in times:
            row |= {"TFLOP/s": f"{work / times['triton'] / 1e9:.1f}", "best peer / ours": f"{best / times['triton']:.2f}"}
        found.append(row)
    return found


def attentions(shape: Shape, device: str, backward: bool) -> Mapping[str, Callable[[], tuple[Tensor, list[Tensor]]]]:
    """Ours and the others', each giving its output and its operands."""
    queries, dtype = shape.queries or shape.length, torch.bfloat16
    sizes = ((shape.heads, queries), (shape.kv_heads, shape.length), (shape.kv_heads, shape.length))
    made = (torch.randn(1, heads, tokens, shape.dim, dtype=dtype, device=device) for heads, tokens in sizes)
    q, k, v = (x.requires_grad_(backward) for x in made)
    causal, grouped = shape.queries is None, shape.heads != shape.kv_heads

    def dense(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    runs: dict[str, Callable[[], Tensor]] = {
        "triton": lambda: attn.attend(q, k, v, shape.variant, target="triton"),  # type: ignore[dict-item,arg-type]
        "cuDNN, dense": lambda: dense(SDPBackend.CUDNN_ATTENTION),
        "flash, dense": lambda: dense(SDPBackend.FLASH_ATTENTION),
        "flex": lambda: flex(shape, q, k, v),
    }
    return {name: (lambda run=run: (run(), [q, k, v])) for name, run in runs.items()}  # type: ignore[misc]


_compiled = torch.compile(flex_attention)
_blocks: dict[str, object] = {}


def flex(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if shape.sees is None:
        raise NotImplementedError(f"{shape.name} is not written for flex_attention")
    if shape.name not in _blocks:
        sees = shape.sees
        seen = create_block_mask(lambda b, h, i, j: sees(i, j), None, None, q.shape[2], k.shape[2], device=q.device.type)
        _blocks[shape.name] = seen
    return _compiled(q, k, v, block_mask=_blocks[shape.name], enable_gqa=q.shape[1] != k.shape[1])  # type: ignore[no-any-return,arg-type]


def step(run: Callable[[], tuple[Tensor, list[Tensor]]], backward: bool) -> Run:
    """A forward pass, or the backward pass of one that was run before."""
    if not backward:
        return lambda: run()[0]
    held: list[tuple[Tensor, list[Tensor]]] = []

    def differentiate() -> object:
        if not held:
            held.append(run())
        out, operands = held[0]
        return torch.autograd.grad(out, operands, out.detach(), retain_graph=True)

    return differentiate


def works(run: Run) -> bool:
    """Whether a peer takes the case at all."""
    try:
        run()
    except (RuntimeError, NotImplementedError, ShapeError) as failure:
        print(f"  left out: {str(failure).splitlines()[0][:150]}")
        return False
    return True


def interleaved(runs: Mapping[str, Run], device: str, rounds: int) -> dict[str, float]:
    """The median milliseconds of each, one round of all after the other."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(once(run) if device == "cuda" else seconds(run) * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


def once(run: Run) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def matmul_ceiling() -> float:
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return round(2 * 8192**3 / min(once(lambda: a @ b) for _ in range(20)) / 1e9, 1)


def copy_ceiling() -> float:
    a, b = (torch.empty(1 << 30, dtype=torch.int8, device="cuda") for _ in range(2))
    return round(2 * (1 << 30) / min(once(lambda: a.copy_(b)) for _ in range(20)) / 1e6, 1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the results go")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=120, help="how many random variants are checked")
    parser.add_argument("--only", default="", help="only shapes with this in their name")
    parser.add_argument("--dry", action="store_true", help="on a CPU, in Triton's interpreter, at tiny shapes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
