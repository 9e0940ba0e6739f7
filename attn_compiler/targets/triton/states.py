"""The kernels of linear attention: one adds keys up to states, one goes over these, and in one queries meet them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from attn_compiler.targets.triton.precision import TF32
from attn_compiler.targets.triton.skeleton import written
from attn_compiler.targets.triton.source import NARROWEST, constants

Fades = Literal["", "whole", "rows", "columns"]  # of a state: nothing, all of it together, each row or column by itself
SEGMENT = 256  # keys between two states: one is as large as many keys, and is written, read and written again, and read
SCANNED = 512  # numbers of a state that one program takes from segment to segment
KERNELS = ("states", "scan", "gather")  # in the order in which they run
FILES = {**{name: name for name in KERNELS}, "step": "gather"}  # `step` is `gather` behind a state


@lru_cache(maxsize=256)
def source(kernel: str, dim: int, value_dim: int, dtype: str, segment: int, width: int, *, fades: Fades) -> str:
    """One of the kernels, which reads the running logs of what `fades` of a state; `step` gathers from a past, too."""
    precision = '"tf32"' if dtype == TF32 else '"ieee"'
    lines = [
        f"DIM, VALUE_DIM = {constants(dim, value_dim)}  # numbers of a query or a key, and of a value",
        f"WIDTH, VALUE_WIDTH = {constants(*widths(dim, value_dim, width, fades))}  # of which so many are at work at once",
        f"SEGMENT = {constants(segment)}  # keys between two states",
        f"PRECISION = {constants(precision)}  # of products of float32",
    ]
    facts = {
        "FADES": fades == "whole",
        "APART": is_apart(fades),
        "ROWS_FADE": fades == "rows",
        "COLUMNS_FADE": fades == "columns",
        "BEHIND": kernel == "step",
    }
    apart = "_apart" if FILES[kernel] == "gather" and is_apart(fades) else ""
    return written(f"{FILES[kernel]}{apart}.py", {"constants": lines}, facts)


def named(names: Sequence[str]) -> Fades:
    """What fades where running logs are named after it."""
    return next((fades for fades in ("whole", "rows", "columns") if fades in names), "")


def is_apart(fades: Fades) -> bool:
    """Whether parts of a state fade each by itself."""
    return fades in ("rows", "columns")


def widths(dim: int, value_dim: int, width: int, fades: Fades) -> tuple[int, int]:
    """How many numbers of a key and of a value are at work at once: powers of two, `width` at most, of keys twice as many.

    Where parts fade apart it is values, since what is found one by one is found again for each of their pieces.
    """
    key, value = (max(NARROWEST, 1 << (size - 1).bit_length()) for size in (dim, value_dim))
    return (min(key, width), min(value, 2 * width)) if is_apart(fades) else (min(key, 2 * width), min(value, width))
