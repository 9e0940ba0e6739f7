"""The generated kernels as older machines would run them, and under sanitizers: each in a process of its own."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FEW, MANY = range(0, 150, 25), range(75)
FORWARD, GRADIENTS = "forward", "gradients"
PROGRAM = """
import sys
import torch
from attn_compiler.errors import ShapeError
from attn_compiler.testing import assert_case, random_case

with torch.set_grad_enabled(sys.argv[1] == "gradients"):
    for seed in map(int, sys.argv[2:]):
        try:
            assert_case(random_case(seed), (torch.float32, torch.bfloat16, torch.float16)[seed % 3], "cpp")
        except ShapeError:
            print(seed, "is refused")
"""
SANITIZED = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g1 -O1"

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="names instruction sets and libraries of g++ on x86-64"
)


def check(seeds: range, flags: str, what: str = FORWARD, **environment: str) -> None:
    """Run the random cases with more flags for the compiler."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, what, *map(str, seeds)],
        env={**os.environ, "ATTN_CXXFLAGS": flags, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 10 * len(done.stdout.splitlines()) < len(seeds)


def has(flag: str) -> bool:
    """Whether this machine has some instructions."""
    known = Path("/proc/cpuinfo")
    return known.exists() and flag in known.read_text().split()


@pytest.mark.parametrize("machine", ["x86-64", "haswell"])
@pytest.mark.parametrize("seeds", [FEW, pytest.param(MANY, marks=pytest.mark.full)], ids=["some", "many"])
def test_kernels_are_right_on_older_machines(machine: str, seeds: range) -> None:
    if machine == "haswell" and not has("avx2"):
        pytest.skip("this machine is older")
    check(seeds, f"-march={machine}")


@pytest.mark.parametrize("machine", ["x86-64", "haswell"])
@pytest.mark.parametrize("seeds", [range(0, 150, 75), pytest.param(MANY, marks=pytest.mark.full)], ids=["some", "many"])
def test_gradients_are_right_on_older_machines(machine: str, seeds: range) -> None:
    if machine == "haswell" and not has("avx2"):
        pytest.skip("this machine is older")
    check(seeds, f"-march={machine}", GRADIENTS)


@pytest.mark.full
@pytest.mark.parametrize("what", [FORWARD, GRADIENTS])
def test_kernels_read_only_what_is_theirs_and_nothing_overflows(what: str) -> None:
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip("there are no sanitizers")
    check(range(60), SANITIZED, what, LD_PRELOAD=":".join(found), ASAN_OPTIONS="detect_leaks=0")
