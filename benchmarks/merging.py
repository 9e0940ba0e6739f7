"""Merged tokens on a CPU: self attention of a diffusion model as it is, with `tome` and with `agentsd`, interleaved.

    python benchmarks/merging.py FOLDER [--threads 1] [--rounds 5] [--side 64]

Writes `merging.md` and `merging.json` to FOLDER. A norm, projections and an attention of 8 heads of 40, float32, compiled; the
yardstick is the same block compiled by Inductor. Times are of the processor, not of the clock on the wall, so that other programs
disturb them less.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _tables import features, markdown, processor, write_json
from linear import milliseconds

HEADS, DIM = 8, 40
POLICIES = ("exact", "tome", "agentsd")
Run = Callable[[], Tensor]


class Block(nn.Module):
    """Self attention of Stable Diffusion's UNet, at full resolution."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * DIM
        self.norm = nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (each(y).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for each in (self.to_q, self.to_k, self.to_v))
        out: Tensor = x + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


def measure(runs: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """Median milliseconds of interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(milliseconds(run))
    return {name: statistics.median(own) for name, own in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(1, given.side**2, HEADS * DIM)
    ways = {name: torch.compile(model, backend="attn", options={"policy": name}) for name in POLICIES}
    with torch.no_grad():
        found = measure(
            {"inductor": partial(torch.compile(model), x)} | {name: partial(way, x) for name, way in ways.items()}, given.rounds
        )
    given.folder.mkdir(parents=True, exist_ok=True)
    rows = [{"block": name, "ms": f"{own:.1f}", "times faster": f"{found['inductor'] / own:.2f}x"} for name, own in found.items()]
    title = f"{given.side**2} tokens, {HEADS} heads of {DIM}, float32, {given.threads} thread, norm and projections included.\n"
    where = f"{processor()} ({features()}), torch {torch.__version__}.\n"
    (given.folder / "merging.md").write_text(f"# Merged tokens on a CPU\n\n{title}{where}\n{markdown(rows)}")
    write_json(given.folder / "merging.json", {"milliseconds": found})
    print(markdown(rows))


if __name__ == "__main__":
    main()
