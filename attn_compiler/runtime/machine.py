"""What is faster on this machine: measured once, and kept beside the kernels."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from attn_compiler.runtime.compiler import digest, folder, load, write
from attn_compiler.targets.cpp.source import probe

_ROUNDS = 7


@cache
def pairs_are_faster() -> bool:
    """Whether bfloat16 numbers are multiplied faster two at a time than one by one as floats."""
    return bool(known("pairs", lambda: float(load(probe()).pairs_are_faster())))


def faster(name: str, theirs: Callable[[], object], ours: Callable[[], object]) -> float:
    """How many times faster `ours` is with as many threads as there are now; `name` says what was compared."""

    def measure() -> float:
        theirs(), ours()
        times = [(_seconds(theirs), _seconds(ours)) for _ in range(_ROUNDS)]
        return min(a for a, _ in times) / min(b for _, b in times)  # other programs only ever make it slower

    return known(f"{name}, {torch.get_num_threads()} threads", measure)


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


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
