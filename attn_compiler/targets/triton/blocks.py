"""How kernels are cut into tiles: what is worth trying for each kind of kernel, the likeliest first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from attn_compiler.targets.triton.precision import in_memory

Kind = Literal["forward", "backward_q", "backward_kv", "diagonals", "decode", "states", "scan", "gather", "step"]  # the skeletons
KINDS: tuple[Kind, ...] = ("forward", "backward_q", "backward_kv", "diagonals", "decode")  # those that meet tiles by scores
STATES: tuple[Kind, ...] = ("states", "gather", "step")  # those of linear attention


@dataclass(frozen=True)
class Blocks:
    """Queries and keys of a tile, warps that share it, and tiles that are loaded ahead.

    `specialized` kernels have four more warps, which do nothing but copy; where the compiler does not make them so, they are
    not worth trying. Kernels of linear attention have `width` numbers of a value at work at once, twice as many of a key;
    where parts of a state fade apart, it is the other way round.
    """

    queries: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 2
    specialized: bool = False
    width: int = 64

    def sizes(self) -> Mapping[str, int]:
        """What kernels call them."""
        return {"BLOCK_Q": self.queries, "BLOCK_K": self.keys}

    def options(self) -> Mapping[str, int]:
        """All that a launch says of them."""
        return {**self.sizes(), "num_warps": self.warps, "num_stages": self.stages}


def candidates(
    kind: Kind, dtype: str, dim: int, machine: str = "", *, codes: bool = False, apart: bool = False
) -> tuple[Blocks, ...]:
    """What is worth trying for heads of `dim` numbers, what any call can be cut into first.

    The queries of `decode` are those that there are. Without a `machine`, what any of NVIDIA's takes. Products of `codes` need
    more registers: those of whole numbers, and of them as floats. Where parts of a state fade `apart`, queries of a tile meet
    as many keys one by one.
    """
    if apart:
        return (_APART_FLOAT32 if dtype == "float32" else _APART)[kind]
    if kind == "step":
        return _STEP
    if kind in STATES:
        return _LINEAR["float32" if dtype == "float32" else "amd" if machine.startswith("gfx") else "narrow"]
    if in_memory(dtype) == "float32" or dim > 128:
        return _WIDE[kind]
    if machine.startswith("gfx"):
        return _AMD[kind]
    usual = _NARROW[kind] if dim <= 64 and not codes else _USUAL[kind]
    return usual + _HOPPER if machine == "sm_90" and kind == "forward" else usual


# Kept in registers: queries · dim of the forward kernel and that of q, 2 · keys · dim of that of k and v, a square of diagonals.
_NARROW: Mapping[Kind, tuple[Blocks, ...]] = {
    "forward": (Blocks(128, 64, 4, 3), Blocks(128, 128, 8, 3), Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 3)),
    "backward_q": (Blocks(64, 64, 4, 2), Blocks(128, 64, 8, 2), Blocks(64, 32, 4, 2)),
    "backward_kv": (
        Blocks(64, 64, 8, 2),
        Blocks(64, 64, 4, 2),
        Blocks(64, 128, 8, 2),
        Blocks(32, 64, 4, 2),
        Blocks(32, 32, 4, 2),
    ),
    "diagonals": (Blocks(64, 64, 4, 2), Blocks(64, 64, 8, 2), Blocks(32, 32, 4, 2)),
    "decode": (Blocks(16, 64, 4, 3), Blocks(16, 128, 4, 3), Blocks(16, 32, 4, 3)),
}
_USUAL: Mapping[Kind, tuple[Blocks, ...]] = {
    "forward": (Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 3), Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2)),
    "backward_q": (Blocks(64, 64, 8, 2), Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2)),
    "backward_kv": (Blocks(32, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(32, 64, 4, 2), Blocks(32, 32, 4, 2)),
    "diagonals": (Blocks(64, 64, 8, 2), Blocks(64, 64, 4, 2), Blocks(32, 32, 4, 2)),
    "decode": (Blocks(16, 64, 4, 3), Blocks(16, 32, 4, 3), Blocks(16, 128, 8, 2)),
}
_WIDE: Mapping[Kind, tuple[Blocks, ...]] = {
    "forward": (Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 2), Blocks(32, 16, 4, 1)),
    "backward_q": (Blocks(32, 32, 4, 2), Blocks(32, 16, 4, 1), Blocks(16, 16, 4, 1)),
    "backward_kv": (Blocks(32, 32, 8, 2), Blocks(16, 32, 4, 1), Blocks(16, 16, 4, 1)),
    "diagonals": (Blocks(32, 32, 4, 2), Blocks(16, 16, 4, 1)),
    "decode": (Blocks(16, 32, 4, 3), Blocks(16, 16, 4, 3), Blocks(16, 16, 4, 2)),
}
_HOPPER = (Blocks(128, 64, 4, 2, specialized=True), Blocks(128, 128, 4, 2, specialized=True))
_AMD: Mapping[Kind, tuple[Blocks, ...]] = {
    "forward": (Blocks(128, 64, 4, 1), Blocks(64, 64, 4, 1), Blocks(64, 32, 4, 2)),
    "backward_q": (Blocks(64, 64, 4, 1), Blocks(64, 32, 4, 1), Blocks(32, 32, 4, 1)),
    "backward_kv": (Blocks(32, 64, 4, 1), Blocks(32, 32, 4, 1), Blocks(16, 32, 4, 1)),
    "diagonals": (Blocks(64, 64, 4, 1), Blocks(32, 32, 4, 1)),
    "decode": (Blocks(16, 64, 4, 2), Blocks(16, 32, 4, 2), Blocks(16, 32, 4, 1)),
}
_LINEAR: Mapping[str, tuple[Blocks, ...]] = {
    "narrow": (Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2), Blocks(64, 64, 8, 2)),
    "float32": (Blocks(32, 32, 4, 2, width=32), Blocks(16, 16, 4, 1, width=32)),
    "amd": (Blocks(64, 64, 4, 1), Blocks(64, 32, 4, 1), Blocks(32, 32, 4, 1, width=32)),
}
_APART: Mapping[Kind, tuple[Blocks, ...]] = {
    "states": (Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 1, width=32)),
    "gather": (Blocks(16, 64, 4, 2), Blocks(32, 64, 8, 2), Blocks(16, 32, 4, 2), Blocks(16, 32, 4, 2, width=32)),
    "step": (Blocks(16, 16, 4, 2), Blocks(16, 16, 4, 2, width=32), Blocks(16, 32, 4, 2)),
}
_APART_FLOAT32: Mapping[Kind, tuple[Blocks, ...]] = {
    "states": (Blocks(32, 32, 4, 2, width=32), Blocks(32, 16, 4, 1, width=32)),
    "gather": (Blocks(16, 32, 4, 2, width=32), Blocks(16, 16, 4, 1, width=32)),
    "step": (Blocks(16, 16, 4, 2, width=32), Blocks(16, 16, 4, 1, width=32)),
}
_STEP = (Blocks(16, 32, 4, 2, width=32), Blocks(64, 32, 4, 2, width=32))  # behind a state queries are few, mostly one
