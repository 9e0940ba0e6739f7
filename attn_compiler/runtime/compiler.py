"""Builds C++ sources, and keeps on disk what was generated: for all processes, one object per source, compiler and machine."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
import warnings
from array import array
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path

from attn_compiler.errors import CompilerError
from attn_compiler.whole_file import whole_file

# No -ffast-math: it would fold the rounding by which exponentials find their integer part.
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=fast",
    "-Wno-psabi", "-fopenmp", "-fPIC", "-shared",
)  # fmt: skip
MOST_KERNELS = 1024  # on disk; the ones that were used longest ago go first
LONGEST_BUILD = 3600.0  # seconds after which nobody can still be at work


@lru_cache
def compiler() -> tuple[str, ...] | None:
    """The command that compiles C++, as Inductor would choose it; None where there is none."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    found = shutil.which(command[0])
    return (found, *command[1:]) if found else None


def flags() -> tuple[str, ...]:
    """What the compiler is told; ATTN_CXXFLAGS has the last word."""
    return (*FLAGS, *shlex.split(os.environ.get("ATTN_CXXFLAGS", "")))


@cache
def macros() -> frozenset[str]:
    """What the compiler defines: above all, the instructions of the machine that it builds for."""
    command = [*(compiler() or ()), *flags(), "-dM", "-E", "-x", "c++", os.devnull]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return frozenset(line.split()[1] for line in lines)


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


def call(run: Callable[[int], object], words: Iterable[int]) -> None:
    """Run a kernel on the fields of its call."""
    fields = array("q", words)  # has to live until the kernel is done
    run(fields.buffer_info()[0])


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write_text(text, encoding="utf-8")


def module(text: str) -> Path:
    """The file of a Python source, which is its own kernel."""
    return _anywhere(lambda place: _kept_text(text, place))


def _built(source: str) -> Path:
    """The shared object of a source."""
    return _anywhere(lambda place: _kept(source, place))


def _anywhere(keep: Callable[[Path], Path]) -> Path:
    """What is kept for all processes, or, where nothing can be kept, for this one."""
    try:
        return keep(folder())
    except OSError as error:
        return keep(_own_folder(folder(), str(error.strerror)))


def _kept_text(text: str, place: Path) -> Path:
    path = place / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.py"
    if not _is_kept(path):
        write(path, text)
        _forget_old(place)
    return path


def _is_kept(path: Path) -> bool:
    if not path.exists():
        return False
    with suppress(OSError):  # it may belong to somebody else
        os.utime(path)  # it was used
    return True


@cache
def _own_folder(wanted: Path, reason: str) -> Path:
    """Where this process keeps its kernels while it lives."""
    warnings.warn(
        f"kernels cannot be kept in {wanted} ({reason}), so each process builds its own: "
        "name a folder that can be written in the environment variable ATTN_CACHE_DIR",
        stacklevel=2,
    )
    made = tempfile.mkdtemp(prefix="attn-compiler-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def _kept(source: str, place: Path) -> Path:
    key = digest(source)
    path = place / f"{key}.so"
    if _is_kept(path):
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
    if command is None:  # what it cannot build may still be known by other means
        return platform.machine()
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    flags = subprocess.run([*command, "-march=native", "-Q", "--help=target"], capture_output=True, text=True, check=False).stdout
    return "\0".join((*command, version, flags, platform.machine()))


def _forget_old(place: Path) -> None:
    """Keep the cache bounded; another process may be doing the same."""
    kernels = sorted((*place.glob("*.so"), *place.glob("*.py")), key=_last_used, reverse=True)
    for path in kernels[MOST_KERNELS:]:
        path.unlink(missing_ok=True)
        path.with_suffix(".cpp").unlink(missing_ok=True)
    for room in place.glob("building-*"):  # of a process that was killed
        if _last_used(room) < time.time() - LONGEST_BUILD:
            shutil.rmtree(room, ignore_errors=True)


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
