"""What the Triton kernels of linear attention become on GPUs that are not here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import product

import pytest

from attn_compiler.runtime.ahead import MACHINES, Compiled, Order, compile_ahead, is_sound
from attn_compiler.runtime.triton_states import order
from attn_compiler.targets.triton.blocks import STATES, Blocks, Kind, candidates
from attn_compiler.targets.triton.precision import TF32
from attn_compiler.targets.triton.states import Fades, is_apart

pytest.importorskip("triton")

DTYPES = ("bfloat16", TF32)  # TF32: what calls in float16 are multiplied as


APART: tuple[tuple[Kind, Fades], ...] = (
    ("states", "rows"), ("states", "columns"), ("gather", "rows"), ("gather", "columns"), ("step", "rows"),
)  # fmt: skip


def tried(kind: Kind, dim: int, dtype: str, machine: str, fades: Fades = "whole") -> list[Order]:
    some = candidates(kind, dtype, dim, machine, apart=is_apart(fades))
    return [order(kind, dim, dtype, machine, blocks, fades) for blocks in some]


def first(kind: Kind, dim: int, dtype: str, machine: str, fades: Fades = "whole") -> Order:
    return tried(kind, dim, dtype, machine, fades)[0]


QUICK = {
    **{f"{kind}, 128, {dtype}": first(kind, 128, dtype, "sm_90") for kind, dtype in product(STATES, DTYPES)},
    "gather, 64": first("gather", 64, "bfloat16", "sm_90"),
    "scan": order("scan", 128, "float32", "sm_90", Blocks()),
    **{f"{kind} by {fades}, 128": first(kind, 128, "bfloat16", "sm_90", fades) for kind, fades in APART},
    **{f"scan by {fades}": order("scan", 128, "float32", "sm_90", Blocks(), fades) for fades in ("rows", "columns")},
}
CONTROLS = {
    "spilling": order("states", 128, TF32, "sm_80", Blocks(64, 64, 4, 2)),
    "odd": first("states", 100, "bfloat16", "sm_90"),
    "float32": first("gather", 64, "float32", "sm_90"),
}


@lru_cache(maxsize=1)
def compiled() -> Mapping[str, Compiled]:
    orders = {**QUICK, **CONTROLS}
    return dict(zip(orders, compile_ahead(list(orders.values())), strict=True))


@pytest.mark.parametrize("name", QUICK)
def test_the_cut_that_is_tried_first_is_sound(name: str) -> None:
    if name.startswith("scan"):  # which multiplies no matrices
        assert not compiled()[name].spills
    else:
        assert is_sound(compiled()[name], QUICK[name])


@pytest.mark.parametrize("name", [name for name in QUICK if not name.startswith(("scan", "step", "gather by"))])
def test_warp_groups_multiply_on_hopper(name: str) -> None:
    assert compiled()[name].count("HGMMA")
    assert not compiled()[name].count("HMMA")


def wide(name: str) -> int:
    """How many instructions copy 16 bytes ahead."""
    return sum(count for stem, count in compiled()[name].opcodes.items() if stem.startswith("LDGSTS") and "128" in stem)


@pytest.mark.parametrize("name", [name for name in QUICK if not name.startswith("scan")])
def test_rows_are_copied_in_steps_of_16_bytes(name: str) -> None:
    """Logs are single numbers of each token, and what TF32 needs turned is copied number by number."""
    assert wide(name)


def test_rows_of_an_odd_length_are_not_copied_so() -> None:
    assert not wide("odd")


def test_tiles_that_are_too_large_are_seen_to_spill() -> None:
    assert compiled()["spilling"].spills
    assert not is_sound(compiled()["spilling"], CONTROLS["spilling"])


def test_float32_is_not_multiplied_in_less() -> None:
    assert not compiled()["float32"].count("HGMMA", "HMMA")


@pytest.mark.full
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("dim", "dtype"), list(product((64, 128), DTYPES)))
@pytest.mark.parametrize("kind", STATES)
def test_some_candidate_of_every_kernel_is_sound(kind: Kind, dim: int, dtype: str, machine: str) -> None:
    orders = tried(kind, dim, dtype, machine)
    assert any(map(is_sound, compile_ahead(orders), orders))


@pytest.mark.full
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("dim", "dtype"), list(product((64, 128), DTYPES)))
@pytest.mark.parametrize(("kind", "fades"), APART)
def test_some_candidate_is_sound_where_parts_fade_apart(kind: Kind, fades: Fades, dim: int, dtype: str, machine: str) -> None:
    orders = tried(kind, dim, dtype, machine, fades)
    assert any(map(is_sound, compile_ahead(orders), orders))
