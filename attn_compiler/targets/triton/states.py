"""The kernels of linear attention: one adds keys up to states, one goes over these, and in one queries meet them."""

from __future__ import annotations

from functools import lru_cache

from attn_compiler.targets.triton.precision import TF32
from attn_compiler.targets.triton.skeleton import written
from attn_compiler.targets.triton.source import NARROWEST, constants

SEGMENT = 256  # keys between two states: one is as large as many keys, and is written, read and written again, and read
SCANNED = 512  # numbers of a state that one program takes from segment to segment
KERNELS = ("states", "scan", "gather")  # in the order in which they run
FILES = {**{name: name for name in KERNELS}, "step": "gather"}  # `step` is `gather` behind a state


@lru_cache(maxsize=256)
def source(kernel: str, dim: int, value_dim: int, dtype: str, segment: int, width: int, *, fades: bool) -> str:
    """One of the kernels, which reads running logs if a decay `fades` what is added up; `step` gathers from a past, too."""
    precision = '"tf32"' if dtype == TF32 else '"ieee"'
    lines = [
        f"DIM, VALUE_DIM = {constants(dim, value_dim)}  # numbers of a query or a key, and of a value",
        f"WIDTH, VALUE_WIDTH = {constants(*widths(dim, value_dim, width))}  # of which so many are at work at once",
        f"SEGMENT = {constants(segment)}  # keys between two states",
        f"PRECISION = {constants(precision)}  # of products of float32",
    ]
    return written(f"{FILES[kernel]}.py", {"constants": lines}, {"FADES": fades, "BEHIND": kernel == "step"})


def widths(dim: int, value_dim: int, width: int) -> tuple[int, int]:
    """How many numbers of a key and of a value are at work at once: powers of two, `width` at most, of keys twice as many."""
    key, value = (max(NARROWEST, 1 << (size - 1).bit_length()) for size in (dim, value_dim))
    return min(key, 2 * width), min(value, width)
