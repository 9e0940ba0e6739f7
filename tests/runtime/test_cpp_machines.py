"""The generated kernels as other machines would run them, and under sanitizers: each in a process of its own."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attn_compiler.algebra.variant import Variant
from attn_compiler.runtime.compiler import FLAGS
from attn_compiler.targets.cpp.gradient import by_key, by_query
from attn_compiler.targets.cpp.source import probe, source
from attn_compiler.targets.cpp.spec import Unit, in_places, spec_of

FEW, MANY = range(0, 150, 25), range(75)
FORWARD, GRADIENTS = "forward", "gradients"
DTYPES = "(torch.float32, torch.bfloat16, torch.float16)"
PROGRAM = f"""
import sys
import torch
from attn_compiler.errors import ShapeError
from attn_compiler.testing import assert_case, random_case

with torch.set_grad_enabled(sys.argv[1] == "gradients"):
    for seed in map(int, sys.argv[2:]):
        try:
            assert_case(random_case(seed), {DTYPES}[seed % 3], "cpp")
        except ShapeError:
            print(seed, "is refused")
"""
ON_TILES = """
from attn_compiler.runtime import kernels
from attn_compiler.targets.cpp.spec import Unit

kernels.fastest = lambda units: units[-1]
assert kernels.unit_for("bfloat16") is Unit.TILES
"""
AMX = "-include " + shlex.quote(str(Path(__file__).parents[1] / "fixtures" / "amx.h"))  # emulates it
WARNINGS = ("-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers", "-Wno-psabi")
REAL_AMX = ("-march=sapphirerapids", "-std=c++17", "-O3", *WARNINGS, "-fopenmp", "-c", "-x", "c++", "-", "-o", "kernel.o")
SANITIZED = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g1 -O1"

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="names instruction sets and libraries of g++ on x86-64"
)


def has(flag: str) -> bool:
    """Whether this machine has some instructions."""
    known = Path("/proc/cpuinfo")
    return known.exists() and flag in known.read_text().split()


needs_avx512 = pytest.mark.skipif(not has("avx512_bf16"), reason="machines with a matrix unit have AVX-512 and its bfloat16, too")


def check(seeds: range, flags: str, what: str = FORWARD, program: str = PROGRAM, **environment: str) -> None:
    """Run the random cases with more flags for the compiler."""
    done = subprocess.run(
        [sys.executable, "-c", program, what, *map(str, seeds)],
        env={**os.environ, "ATTN_CXXFLAGS": flags, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 10 * len(done.stdout.splitlines()) < len(seeds)


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


@needs_avx512
@pytest.mark.parametrize(
    ("what", "seeds"),
    [
        (FORWARD, range(0, 4, 3)),
        (GRADIENTS, range(2, 3)),
        pytest.param(FORWARD, MANY, marks=pytest.mark.full),
        pytest.param(GRADIENTS, MANY, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_kernels_are_right_on_an_emulated_matrix_unit(what: str, seeds: range) -> None:
    check(seeds, AMX, what, ON_TILES + PROGRAM.replace(DTYPES, "(torch.bfloat16, torch.bfloat16, torch.bfloat16)"))


@needs_avx512
def test_the_emulated_matrix_unit_minds_its_rules(tmp_path: Path) -> None:
    kernel = probe(Unit.TILES)
    assert kernel.count("  Unit unit;\n") == 1
    forgetful = kernel.replace("  Unit unit;\n", "") + "\nint main() { return seconds() < 0; }\n"
    (tmp_path / "main.cpp").write_text(forgetful)
    build = ["g++", *FLAGS[: FLAGS.index("-fPIC")], *shlex.split(AMX), "main.cpp", "-o", "main"]
    subprocess.run(build, cwd=tmp_path, check=True)
    done = subprocess.run(["./main"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode
    assert "tiles were used before their shapes were loaded" in done.stderr


def test_kernels_for_a_matrix_unit_are_made_of_its_instructions(tmp_path: Path) -> None:
    spec = spec_of(in_places(Variant(), q_counted=True, k_counted=True), 64, 64, "bfloat16", {}, Unit.TILES)
    for kernel in (source(spec), by_query(spec, ()), by_key(spec, ())):
        done = subprocess.run(["g++", *REAL_AMX], input=kernel, cwd=tmp_path, capture_output=True, text=True, check=False)
        if "sapphirerapids" in done.stderr:
            pytest.skip("this compiler knows no matrix unit")
        assert (done.returncode, done.stderr) == (0, "")
        listing = subprocess.run(["objdump", "-d", "kernel.o"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for instruction in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"):
            assert instruction in listing


@pytest.mark.full
@pytest.mark.parametrize("what", [FORWARD, GRADIENTS])
@pytest.mark.parametrize("tiles", [False, pytest.param(True, marks=needs_avx512)], ids=["vectors", "tiles"])
def test_kernels_read_only_what_is_theirs_and_nothing_overflows(what: str, tiles: bool) -> None:
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip("there are no sanitizers")
    flags, program = (f"{SANITIZED} {AMX}", ON_TILES + PROGRAM) if tiles else (SANITIZED, PROGRAM)
    check(range(60), flags, what, program, LD_PRELOAD=":".join(found), ASAN_OPTIONS="detect_leaks=0")
