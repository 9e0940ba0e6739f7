"""What Triton kernels of codes become on GPUs that are not here: each product is the machine's own, and nothing spills."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest

from attn_compiler.errors import CompilerError
from attn_compiler.runtime.ahead import Compiled, Order, compile_each, is_sound
from attn_compiler.runtime.kernel_source import shape_of
from attn_compiler.runtime.kernels import Shape
from attn_compiler.runtime.triton_orders import cuts, order
from attn_compiler.targets.triton.blocks import Blocks, Kind
from attn_compiler.targets.triton.coded import encoder
from attn_compiler.testing import variant_of

pytest.importorskip("triton")

WINDOW = "causal & window(1024)"
INT8: dict[str, Any] = {"qk": {"type": "int8", "smooth": True}, "pv": "int8"}
FP8: dict[str, Any] = {"qk": "int8", "pv": "fp8_e4m3"}
STORAGES: tuple[dict[str, Any], ...] = ({"qk": "int8"}, INT8, FP8, {"qk": "fp8_e5m2", "pv": "fp16"})
CACHES = ("int8", "int4", "fp8_e4m3", "fp8_e5m2")
MACHINES = ("sm_80", "sm_90", "sm_100", "gfx942")


def shape_for(storage: dict[str, Any], dim: int, dtype: str = "bfloat16") -> Shape:
    """A prompt; of a cache that holds codes, a token."""
    q_len, kv_heads = (1, 2) if "kv_cache" in storage else (4096, 8)
    shape = shape_of(WINDOW, q_len=q_len, k_len=4096, heads=8, kv_heads=kv_heads, head_dim=dim, dtype=dtype, target="triton")
    return replace(shape, variant=replace(shape.variant, storage=variant_of({"storage": storage}).storage))


def order_of(storage: dict[str, Any], dim: int, machine: str, number: int = 0) -> Order:
    """A kernel, cut as it is tried at a place."""
    shape, kind = shape_for(storage, dim), kind_of(storage)
    return order(shape, kind, cuts(shape, kind, machine)[number], machine)


def kind_of(storage: dict[str, Any]) -> Kind:
    return "decode" if "kv_cache" in storage else "forward"


def encoder_for(machine: str, codes: str, *, alone: bool, given: bool, placed: bool = False) -> Order:
    """The kernel that makes codes, for each token, all of a channel, or blocks in an order; others where means are apart."""
    wanted = {"means": given, "others": given, "dots": given, "largest": not (alone or placed), "scales": alone or placed}
    constants: dict[str, float | None] = {
        "MOST": 127.0,
        "LEAST": 2.0**-100,
        "ALONE": alone,
        "BLOCK": 64,
        "DIM": 128,
        "WIDTH": 128,
    }
    constants |= {name: None for name, there in wanted.items() if not there} | ({} if placed else {"places": None})
    return Order(encoder(), "bfloat16", (), machine, Blocks(), (("codes", codes),), (), tuple(constants.items()))


QUICK: Mapping[str, Order] = {
    "int8 and bfloat16, 64": order_of({"qk": "int8"}, 64, "sm_90"),
    "int8 and bfloat16, 128": order_of({"qk": "int8"}, 128, "sm_90"),
    "int8, 64": order_of(INT8, 64, "sm_90"),
    "int8, 128": order_of(INT8, 128, "sm_90", 1),
    "int8 and e4m3, 64": order_of(FP8, 64, "sm_90"),
    "int8 and e4m3, 128": order_of(FP8, 128, "sm_90", 2),
    "cache of int8": order_of({"kv_cache": "int8"}, 128, "sm_90"),
    "cache of e4m3": order_of({"kv_cache": "fp8_e4m3"}, 64, "sm_90"),
    "int8, sm_80": order_of(INT8, 128, "sm_80"),
    "int8 and e4m3, sm_100": order_of(FP8, 128, "sm_100"),
    "int8, gfx942": order_of(INT8, 64, "gfx942"),
}
ENCODERS: Mapping[str, Order] = {
    "by token": encoder_for("sm_90", "int8", alone=True, given=True),
    "by channel, e4m3": encoder_for("sm_90", "float8_e4m3fn", alone=False, given=False),
    "by token, sm_80": encoder_for("sm_80", "int8", alone=True, given=False),
    "in order": encoder_for("sm_90", "int8", alone=False, given=True, placed=True),
    "by token, gfx942": encoder_for("gfx942", "int8", alone=True, given=True),
}
CONTROLS: Mapping[str, Order] = {
    "numbers": order(shape_for({}, 64), "forward", Blocks(128, 64, 8, 3), "sm_90"),
    "spilling": order(shape_for(FP8, 128), "forward", Blocks(128, 128, 8, 3), "sm_90"),
    "e4m3, sm_80": order_of(FP8, 128, "sm_80"),
}


@lru_cache(maxsize=1)
def compiled() -> Mapping[str, Compiled | CompilerError]:
    orders = {**QUICK, **ENCODERS, **CONTROLS}
    return dict(zip(orders, compile_each(list(orders.values())), strict=True))


def found(name: str) -> Compiled:
    one = compiled()[name]
    assert isinstance(one, Compiled)
    return one


@pytest.mark.parametrize("name", QUICK)
def test_a_cut_that_is_tried_is_sound(name: str) -> None:
    assert is_sound(found(name), QUICK[name])


@pytest.mark.parametrize(
    ("name", "instructions"),
    [
        ("int8 and bfloat16, 128", ("IGMMA", "HGMMA")),
        ("int8, 128", ("IGMMA",)),
        ("int8 and e4m3, 64", ("IGMMA", "QGMMA")),
        ("int8 and e4m3, 128", ("IGMMA", "QGMMA")),
        ("cache of int8", ("HMMA",)),
        ("int8, sm_80", ("IMMA",)),
        ("int8 and e4m3, sm_100", ("IMMA", "UTCQMMA")),
    ],
)
def test_each_product_is_the_machine_s_own(name: str, instructions: tuple[str, ...]) -> None:
    every = ("HMMA", "HGMMA", "IMMA", "IGMMA", "QMMA", "QGMMA", "UTCHMMA", "UTCQMMA")
    assert {one.split(".")[0] for one in found(name).opcodes} & set(every) == set(instructions)


@pytest.mark.parametrize("name", ENCODERS)
def test_what_makes_codes_compiles_without_spills(name: str) -> None:
    assert not found(name).spills


@pytest.mark.parametrize("name", ["cache of int8", "cache of e4m3"])
def test_codes_of_a_cache_are_copied_four_at_a_time(name: str) -> None:
    """A row ends in a float, so it starts at a multiple of four bytes; without knowing that, single bytes would be loaded."""
    one = found(name)
    assert one.count("LDGSTS.E") > 0
    assert one.count("LDG.E.U8", "LDG.E.S8") <= 8


def test_codes_that_are_multiplied_as_numbers_are_seen() -> None:
    given = CONTROLS["numbers"]
    assert is_sound(found("numbers"), given)
    assert not is_sound(found("numbers"), replace(given, multiplied=("int8", "bfloat16")))
    assert not is_sound(found("int8, 64"), replace(QUICK["int8, 64"], multiplied=("bfloat16",)))


def test_tiles_that_are_too_large_are_seen_to_spill() -> None:
    assert found("spilling").spills


def test_a_machine_without_floats_of_a_byte_compiles_no_e4m3() -> None:
    assert "fp8e4nv not supported" in str(compiled()["e4m3, sm_80"])


@pytest.mark.full
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("storage", [*STORAGES, *({"kv_cache": one} for one in CACHES)], ids=str)
def test_some_candidate_of_every_kernel_is_sound(storage: dict[str, Any], dim: int, machine: str) -> None:
    if machine == "sm_80" and "fp8_e4m3" in storage.values() and "kv_cache" not in storage:
        return  # which the target refuses there
    shape, kind = shape_for(storage, dim), kind_of(storage)
    orders = [order(shape, kind, blocks, machine) for blocks in cuts(shape, kind, machine) if not blocks.specialized]
    tried = zip(compile_each(orders), orders, strict=True)
    assert any(isinstance(one, Compiled) and is_sound(one, given) for one, given in tried)
