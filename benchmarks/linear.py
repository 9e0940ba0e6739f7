"""Linear attention on a CPU: the generated kernel beside dense SDPA and PyTorch's operators, interleaved in one process.

    python benchmarks/linear.py FOLDER [--threads 1] [--rounds 5] [--longest 8192] [--inductor] [--fla]

Writes `linear.json` and `linear.md` to FOLDER. Causal, 8 heads of 64, float32. Dense causal SDPA is the yardstick up to
`--longest` tokens; beyond, only the kernel runs, whose time for a token should not change. `--inductor` adds the same operators
compiled, `--fla` FLA's forms in PyTorch (`pip install --no-deps fla-core einops`). Times are of the processor, not of the clock
on the wall, so that other programs disturb them less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import attn_compiler as attn
from _tables import features, markdown, processor, write_json

HEADS, DIM = 8, 64
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
GATED = {"mask": "causal", "state": "gate(vector)", "normalizer": "linear(none)", "scale": "1 / sqrt(dim)"}
MUST = {512: 3, 2048: 7, 8192: 25}  # times dense SDPA, where the machine has AVX-512
ELU = {"feature": "elu_one", "mask": "causal"}
FADING = {**ELU, "state": "decay(2 ** (-8 * (h + 1) / heads))"}
Run = Callable[[], Tensor]


def runs(length: int, longest: int, *, inductor: bool, fla: bool) -> dict[str, Run]:
    """Everybody's way at a length; the yardstick first, where it still runs."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, length, DIM, generator=generator) for _ in range(3))

    steps = torch.randn(1, HEADS, length, DIM, generator=generator).sub(3).sigmoid().neg().log1p()  # logs of gates
    running = steps.double().cumsum(2)

    def attend(variant: object, target: str) -> Run:
        tables = {"gate": running} if variant is GATED else {}
        return lambda: attn.attend(q, k, v, variant, tables=tables, target=target)  # type: ignore[arg-type,return-value]

    ours = {"cpp": attend(ELU, "cpp"), "cpp, decay": attend(FADING, "cpp"), "cpp, gates": attend(GATED, "cpp")}
    if length > longest:
        return ours
    dense: dict[str, Run] = {"sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)}
    theirs = {"torch": ELU, "torch, decay": FADING, "torch, gates": GATED}
    found = dense | ours | {name: attend(variant, "torch") for name, variant in theirs.items()}
    if inductor:
        found["inductor"] = torch.compile(attend(ELU, "torch"), dynamic=False)
    if fla:
        found["fla naive"] = naive(q, k, v)
        found["fla naive, gates"] = naive_gates(q, k, v, steps)
        for one in ("", ", gates"):
            torch.testing.assert_close(found[f"fla naive{one}"](), ours[f"cpp{one}"](), rtol=1e-3, atol=1e-4)
    return found


def naive(q: Tensor, k: Tensor, v: Tensor) -> Run:
    """FLA's own form without Triton, which wants tokens before heads."""
    from fla.ops.linear_attn.naive import naive_chunk_linear_attn  # type: ignore[import-not-found]

    def run() -> Tensor:
        q_, k_, v_ = (x.transpose(1, 2) for x in (F.elu(q) + 1, F.elu(k) + 1, v))
        out = naive_chunk_linear_attn(q_, k_, v_, scale=1.0, normalize=True)
        return out.transpose(1, 2)  # type: ignore[no-any-return]

    return run


def naive_gates(q: Tensor, k: Tensor, v: Tensor, steps: Tensor) -> Run:
    """FLA's own form of GLA without Triton, token by token."""
    from fla.ops.gla.naive import naive_recurrent_gla  # type: ignore[import-not-found]

    def run() -> Tensor:
        out, _ = naive_recurrent_gla(*(x.transpose(1, 2) for x in (q, k, v, steps)))
        return out.transpose(1, 2)  # type: ignore[no-any-return]

    return run


def measure(length: int, rounds: int, longest: int, *, inductor: bool, fla: bool) -> dict[str, float]:
    """Median milliseconds of interleaved rounds."""
    ways = runs(length, longest, inductor=inductor, fla=fla)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    for _ in range(rounds):
        for name, run in ways.items():
            times[name].append(milliseconds(run))
    return {name: statistics.median(own) for name, own in times.items()}


def milliseconds(run: Run, least: float = 0.03) -> float:
    """The processor's time for one call, from as many as take `least` seconds."""
    start, count = time.process_time(), 0
    while time.process_time() - start < least:
        run()
        count += 1
    return (time.process_time() - start) / count * 1e3


def row(length: int, found: dict[str, float]) -> dict[str, object]:
    """What a table shows: how many times faster than the yardstick everybody is, and what a token costs the kernel."""
    dense = found.get("sdpa")
    states = (f"{target}{what}" for target in ("cpp", "torch") for what in ("", ", decay", ", gates"))
    others = (*states, "inductor", "fla naive", "fla naive, gates")
    ratios = {name: f"{dense / found[name]:.2f}x" if dense and name in found else "" for name in others}
    shown: dict[str, object] = {"tokens": length, "sdpa ms": f"{dense:.2f}" if dense else "", **ratios}
    return shown | {"must": f"{MUST[length]}x" if length in MUST else "", "cpp µs a token": f"{found['cpp'] / length * 1e3:.2f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--longest", type=int, default=8192)
    parser.add_argument("--inductor", action="store_true")
    parser.add_argument("--fla", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found: dict[int, dict[str, float]] = {}
    with torch.no_grad():
        for length in LENGTHS:
            found[length] = measure(length, given.rounds, given.longest, inductor=given.inductor, fla=given.fla)
            print(length, row(length, found[length]), flush=True)
    given.folder.mkdir(parents=True, exist_ok=True)
    rows = [row(length, times) for length, times in found.items()]
    what = "elu + 1; `gates`: of each feature, as in GLA"
    sizes = f"{HEADS} heads of {DIM}, float32, {given.threads} thread"
    title = f"Causal linear attention ({what}), {sizes}, over dense causal SDPA.\n"
    where = f"{processor()} ({features()}), torch {torch.__version__}.\n"
    (given.folder / "linear.md").write_text(f"# Linear attention on a CPU\n\n{title}{where}\n{markdown(rows)}")
    write_json(given.folder / "linear.json", {"milliseconds": {str(length): times for length, times in found.items()}})


if __name__ == "__main__":
    main()
