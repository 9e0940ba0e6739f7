"""Builds C++ sources: one shared object per source, compiler and machine, kept on disk for all processes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache, lru_cache
from pathlib import Path

from attn_compiler.errors import CompilerError

# No -ffast-math: it would fold the rounding by which exponentials find their integer part.
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=fast",
    "-Wno-psabi", "-fopenmp", "-fPIC", "-shared",
)  # fmt: skip
MOST_KERNELS = 1024  # on disk; the ones that were used longest ago go first


@lru_cache
def compiler() -> tuple[str, ...] | None:
    """The command that compiles C++, as Inductor would choose it; None where there is none."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    found = shutil.which(command[0])
    return (found, *command[1:]) if found else None


def flags() -> tuple[str, ...]:
    """What the compiler is told; ATTN_CXXFLAGS has the last word."""
    return (*FLAGS, *shlex.split(os.environ.get("ATTN_CXXFLAGS", "")))


def why_not() -> str | None:
    """Why nothing can be built on this machine; None if it can."""
    return None if compiler() else "there is no C++ compiler: install g++, or name one in the environment variable CXX"


def load(source: str) -> ctypes.CDLL:
    """The shared object of a source, built now unless some process has built it before."""
    return _loaded(str(_built(source)))


@cache
def _loaded(path: str) -> ctypes.CDLL:
    return ctypes.CDLL(path)


def folder() -> Path:
    """Where kernels are kept."""
    chosen = os.environ.get("ATTN_CACHE_DIR")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "attn-compiler"


def digest(*texts: str) -> str:
    """A name for some texts as this compiler, with these flags, on this machine makes something of them."""
    return hashlib.sha256("\0".join((*texts, _identity(), *flags())).encode()).hexdigest()[:32]


def _built(source: str) -> Path:
    key, place = digest(source), folder()
    path = place / f"{key}.so"
    if path.exists():
        os.utime(path)  # it was used
        return path
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix="building-") as room:
        _compile(source, Path(room))
        (Path(room) / "kernel.cpp").replace(place / f"{key}.cpp")
        (Path(room) / "kernel.so").replace(path)  # whole or not at all, whoever else does the same
    _forget_old(place)
    return path


def _compile(source: str, room: Path) -> None:
    command = compiler()
    if command is None:
        raise CompilerError(str(why_not()))
    (room / "kernel.cpp").write_text(source, encoding="utf-8")
    done = subprocess.run(
        [*command, *flags(), "kernel.cpp", "-o", "kernel.so"], cwd=room, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CompilerError(f"{command[0]} cannot build a kernel:\n{done.stderr[-2000:]}")


@lru_cache
def _identity() -> str:
    """What besides the source decides what comes out: the compiler, and the machine that `native` stands for."""
    command = compiler()
    if command is None:
        raise CompilerError(str(why_not()))
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    flags = subprocess.run([*command, "-march=native", "-Q", "--help=target"], capture_output=True, text=True, check=False).stdout
    return "\0".join((*command, version, flags, platform.machine()))


def _forget_old(place: Path) -> None:
    """Keep the cache bounded; another process may be doing the same."""
    kernels = sorted(place.glob("*.so"), key=_last_used, reverse=True)
    for path in kernels[MOST_KERNELS:]:
        path.unlink(missing_ok=True)
        path.with_suffix(".cpp").unlink(missing_ok=True)


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
