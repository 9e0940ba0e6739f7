"""Whether generated Triton kernels are right on a GPU: random calls against float64, and under NVIDIA's sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import attn_compiler as attn
from _gpu_clock import Clock
from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Sort
from attn_compiler.errors import ShapeError
from attn_compiler.runtime import tuning
from attn_compiler.testing import Case, assert_case, assert_within_budget, random_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STORAGES: tuple[dict[str, object], ...] = (
    {"qk": "int8", "pv": "int8"}, {"qk": {"type": "int8", "smooth": True}, "pv": "fp8_e4m3"}, {"qk": "int4", "pv": "fp8_e5m2"},
    {"qk": {"type": "int8", "per": "block(24)"}, "pv": "fp16"},
)  # fmt: skip
TOOLS = ("memcheck", "racecheck")
PATIENCE = 90  # seconds for each tool


def correctness(clock: Clock, seeds: int) -> dict[str, Any]:
    """Random variants, forward and backward, and their last queries as while decoding, until there is no time left.

    Each is cut in another way: what a clock would choose is no matter here.
    """
    carried, wrong = 0, []
    for seed in count():
        if seed == seeds or not clock.has(0):
            return {"seeds": seed, "carried": carried, "right": carried - len(wrong), "wrong": wrong}
        for few in (False, True):
            try:
                check(seed, clock.device, few=few)
                carried += 1
            except ShapeError:
                continue
            except AssertionError as failure:
                carried += 1
                wrong.append(f"seed {seed}{', few queries' if few else ''}: {failure}")
    raise AssertionError


def check(seed: int, device: str, *, few: bool) -> None:
    case = random_case(seed)
    case = on_device(case if seed % 4 or case.variant.groups else in_blocks(case, seed), device)
    with cut_by_number(seed), torch.set_grad_enabled(not few):
        assert_case(case.last(1 + seed % 16) if few else case, DTYPES[seed % 3], "triton")


def in_blocks(case: Case, seed: int) -> Case:
    """The same where a bitmap hides half of all blocks, too: what it shows is listed on the device."""
    shown = torch.rand(case.q.shape[1], 5, 5, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = case.variant.mask & e.table("shown", e.h, e.q // 16, e.k // 16, sort=Sort.BOOL)
    return replace(case, variant=replace(case.variant, mask=mask), tables={**case.tables, "shown": shown})


def of_codes(device: str) -> dict[str, str]:
    """Whether calls of codes cost what rounding does, and nothing more; what a device refuses is said."""
    found = {}
    for storage, dtype in product(STORAGES, DTYPES):
        q, k, v = (x.to(device, dtype) for x in torch.randn(3, 1, 2, 80, 64, generator=torch.Generator().manual_seed(0)))
        slots = {"mask": "causal & window(50)", "storage": storage}
        name = f"{', '.join(f'{operand} {how}' for operand, how in storage.items())}, {dtype}"
        try:
            exact, plain = attn.reference(q, k, v, slots["mask"]), attn.attend(q, k, v, slots, target="torch")
            assert_within_budget(attn.attend(q, k, v, slots, target="triton"), exact, plain)
            found[name] = "right"
        except (ShapeError, AssertionError) as failure:
            found[name] = str(failure)
    return found


@contextmanager
def cut_by_number(number: int) -> Iterator[None]:
    """Let no clock choose among the ways to cut a kernel, and nobody remember what was chosen."""
    chosen = mock.patch.object(tuning, "best", lambda orders, time: number % len(orders))
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"ATTN_CACHE_DIR": folder}), chosen:
        yield


def on_device(case: Case, device: str) -> Case:
    positions = case.q_positions.to(device) if isinstance(case.q_positions, Tensor) else case.q_positions
    tables = {name: table.to(device) for name, table in case.tables.items()}
    q, k, v = (x.to(device) for x in (case.q, case.k, case.v))
    return replace(case, q=q, k=k, v=v, tables=tables, q_positions=positions)


def sanitized(seeds: int = 4) -> dict[str, str]:
    """What each tool of compute-sanitizer says of a few random calls."""
    found = shutil.which("compute-sanitizer")
    if not found:
        return dict.fromkeys(TOOLS, "compute-sanitizer is not installed")
    command = [sys.executable, str(Path(__file__).with_name("gpu.py")), "--check", str(seeds)]
    said = {}
    for tool in TOOLS:
        try:
            done = subprocess.run(
                [found, "--tool", tool, "--error-exitcode", "9", *command],
                capture_output=True, text=True, check=False, timeout=PATIENCE,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            said[tool] = f"no answer within {PATIENCE} s"
            continue
        said[tool] = "clean" if not done.returncode else f"exit {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"
    return said
