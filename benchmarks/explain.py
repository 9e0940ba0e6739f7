"""What it takes to explain a model of 70 billion parameters from its configuration: `python benchmarks/explain.py`."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass

import torch

LLAMA_70B = (
    "hf:llama,hidden_size=8192,intermediate_size=28672,num_hidden_layers=80,num_attention_heads=64,"
    "num_key_value_heads=8,vocab_size=128256,max_position_embeddings=8192"
)
COMMAND = "from attn_compiler.cli import app; app()"


@dataclass(frozen=True)
class Row:
    """One command, from the start of its process to its end."""

    length: int
    wall: float
    processor: float
    peak_gib: float


def measured(length: int) -> Row:
    """Explain in a process of its own, so that importing counts."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-c", COMMAND, "explain", LLAMA_70B, "--length", str(length)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Row(length, wall, processor, after.ru_maxrss / 2**20)  # the peak is the largest of all children so far


def main() -> None:
    """Print a table."""
    load = os.getloadavg()[0]
    print(f"`attn explain {LLAMA_70B}`\n")
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, PyTorch {torch.__version__}\n")
    print("| tokens | wall, s | processor, s | peak memory, GiB |\n|---|---|---|---|")
    for length in (1024, 4096):
        row = measured(length)
        print(f"| {row.length} | {row.wall:.1f} | {row.processor:.1f} | {row.peak_gib:.2f} |", flush=True)


if __name__ == "__main__":
    main()
