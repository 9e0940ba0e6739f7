"""What is faster on this machine: measured once, and kept beside the kernels."""

from __future__ import annotations

import ctypes
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from attn_compiler.runtime.compiler import digest, folder, load, macros, write
from attn_compiler.targets.cpp.source import probe
from attn_compiler.targets.cpp.spec import Unit

_ROUNDS = 7
_BETWEEN = 1 << 23  # numbers that a model reads between two attentions: more than caches hold
_REQUEST_FOR_TILES = 158, 0x1023, 18  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)


@cache
def fastest(units: Sequence[Unit]) -> Unit:
    """Which of some units multiplies bfloat16 fastest on this machine; the first of them always can."""
    return min(filter(_is_there, units), key=_seconds_of)


def _is_there(unit: Unit) -> bool:
    return unit.is_among(macros()) and (unit is not Unit.TILES or may_use_tiles())


def _seconds_of(unit: Unit) -> float:
    """How long a unit takes for the products of one token. A unit is worth the copies that it needs, so they count."""
    probing = load(probe(unit)).seconds
    probing.restype = ctypes.c_double
    return known(f"bfloat16 by {unit.name.lower()}", lambda: float(probing()))


@cache
def may_use_tiles() -> bool:
    """Whether this process may use AMX: Linux keeps tiles of a process only once it has asked for that."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return {"amx_tile", "amx_bf16"} <= set(flags) and not ctypes.CDLL(None).syscall(*_REQUEST_FOR_TILES)


def faster(name: str, theirs: Callable[[], object], ours: Callable[[], object]) -> float:
    """How many times faster `ours` is with as many threads as there are now; `name` says what was compared.

    As in a model: between two calls its weights go through the caches, and short calls then take several times as long.
    """

    def measure() -> float:
        theirs(), ours()
        weights = torch.ones(_BETWEEN)
        times = [(_seconds(theirs, weights), _seconds(ours, weights)) for _ in range(_ROUNDS)]
        return min(a for a, _ in times) / min(b for _, b in times)  # other programs only ever make it slower

    return known(f"{name}, after other work, {torch.get_num_threads()} threads", measure)


def known(question: str, measure: Callable[[], float]) -> float:
    """The answer that some process has found on this machine before, or a new one."""
    place = folder() / f"machine-{digest(version('attn-compiler'))}.json"
    answer = _answers(place).get(question)
    if answer is None:
        answer = measure()
        with suppress(OSError):  # where nothing can be kept, every process measures for itself
            write(place, json.dumps(_answers(place) | {question: answer}))  # others may have answered other questions meanwhile
    return answer


def _answers(place: Path) -> dict[str, float]:
    """What is known; nothing where the file is missing, or damaged."""
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _seconds(run: Callable[[], object], weights: Tensor) -> float:
    weights.sum()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
