"""What Triton kernels become on GPUs that are not here: no spilled registers, tensor cores, loads of 16 bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import product

import pytest

from attn_compiler.errors import CompilerError
from attn_compiler.runtime.ahead import MACHINES, Compiled, Order, compile_ahead, compile_each, is_sound
from attn_compiler.runtime.kernel_source import shape_of
from attn_compiler.runtime.triton_orders import order, suits
from attn_compiler.targets.triton.blocks import KINDS, Blocks, Kind, candidates

pytest.importorskip("triton")

VARIANTS: Mapping[str, Mapping[str, object]] = {
    "window": {"mask": "causal & window(1024)"},
    "dense": {"mask": "all"},
    "sinks and softcap": {"mask": "causal & (window(1024) | sinks(4))", "score": "softcap(score, 50)"},
    "documents and alibi": {"mask": "causal & same(documents)", "score": "score + alibi"},
    "a bias by distance": {"mask": "causal", "score": "score + relative(bias, 4096)"},
}
WANTED: Mapping[str, Collection[str]] = {"a bias by distance": ("bias",)}  # the tables that want gradients
SPILLING = Blocks(128, 128, 4, 2)
SPECIALIZED = Blocks(128, 64, 4, 2, specialized=True)
UNDIVIDED = ("documents and alibi", "a bias by distance")  # which read tables, key by key: Triton's pass fails there, and says so
SINGLE = ("backward_kv", "specialized", "documents", "bias")  # where single numbers are copied ahead, of queries or of tables
NOT_A_KERNEL = "import triton\n\n\n@triton.jit\ndef forward(q):\n    nothing\n"


def order_of(kind: Kind, dim: int, dtype: str, machine: str, blocks: Blocks | None = None, variant: str = "window") -> Order:
    """A kernel; cut as it is tried first, unless said otherwise."""
    q_len, kv_heads = (1, 2) if kind == "decode" else (4096, 8)
    shape = shape_of(
        VARIANTS[variant], q_len=q_len, k_len=4096, heads=8, kv_heads=kv_heads, head_dim=dim, dtype=dtype, target="triton"
    )
    first, *_ = candidates(kind, dtype, dim, machine)
    assert suits(shape, blocks or first, 0)
    wanted = WANTED.get(variant, ()) if kind in ("backward_q", "backward_kv", "diagonals") else ()
    return order(shape, kind, blocks or first, machine, wanted=wanted)


QUICK = {
    "forward, 64, sm_90": order_of("forward", 64, "bfloat16", "sm_90"),
    "forward, 128, sm_90": order_of("forward", 128, "bfloat16", "sm_90"),
    "specialized, 64, sm_90": order_of("forward", 64, "float16", "sm_90", replace(SPECIALIZED, keys=128)),
    "specialized, 128, sm_90": order_of("forward", 128, "bfloat16", "sm_90", SPECIALIZED, "sinks and softcap"),
    "backward_q, 128, sm_90": order_of("backward_q", 128, "bfloat16", "sm_90"),
    "backward_kv, 128, sm_90": order_of("backward_kv", 128, "float16", "sm_90"),
    "decode, 128, sm_90": order_of("decode", 128, "bfloat16", "sm_90"),
    "documents, forward, 128, sm_90": order_of("forward", 128, "bfloat16", "sm_90", variant="documents and alibi"),
    "documents, backward_kv, 128, sm_90": order_of("backward_kv", 128, "bfloat16", "sm_90", variant="documents and alibi"),
    "bias, backward_q, 128, sm_90": order_of("backward_q", 128, "bfloat16", "sm_90", variant="a bias by distance"),
    "bias, backward_kv, 128, sm_90": order_of("backward_kv", 128, "bfloat16", "sm_90", variant="a bias by distance"),
    "bias, diagonals, 128, sm_90": order_of("diagonals", 128, "bfloat16", "sm_90", variant="a bias by distance"),
    "forward, 64, sm_80": order_of("forward", 64, "float16", "sm_80"),
    "forward, 128, gfx942": order_of("forward", 128, "float16", "gfx942"),
}
CONTROLS = {
    "undivided": order_of("forward", 128, "bfloat16", "sm_90", replace(SPECIALIZED, warps=8)),
    "spilling": order_of("forward", 128, "bfloat16", "sm_90", SPILLING),
    "odd": order_of("forward", 20, "bfloat16", "sm_90"),
    "float32": order_of("forward", 64, "float32", "sm_90"),
    "no kernel": Order(NOT_A_KERNEL, "float16", (), "sm_90", Blocks()),
}


@lru_cache(maxsize=1)
def compiled() -> Mapping[str, Compiled | CompilerError]:
    orders = {**QUICK, **CONTROLS}
    return dict(zip(orders, compile_each(list(orders.values())), strict=True))


def found(name: str) -> Compiled:
    one = compiled()[name]
    assert isinstance(one, Compiled)
    return one


@pytest.mark.parametrize("name", QUICK)
def test_the_cut_that_is_tried_first_is_sound(name: str) -> None:
    assert is_sound(found(name), QUICK[name])


@pytest.mark.parametrize(
    "name",
    [name for name in QUICK if "sm_" in name and not any(x in name for x in SINGLE)],
)
def test_what_is_copied_ahead_comes_in_steps_of_16_bytes(name: str) -> None:
    assert found(name).loads_in_whole


def test_rows_of_an_odd_length_are_not_copied_so() -> None:
    assert not found("odd").loads_in_whole


@pytest.mark.parametrize("name", [name for name in QUICK if "sm_90" in name and "decode" not in name])
def test_warp_groups_multiply_on_hopper(name: str) -> None:
    assert found(name).count("HGMMA")
    assert not found(name).count("HMMA")


@pytest.mark.parametrize("name", ["specialized, 64, sm_90", "specialized, 128, sm_90"])
def test_some_warps_do_nothing_but_copy_whole_tiles(name: str) -> None:
    one = found(name)
    assert one.count("UTMALDG") > 1  # queries, keys, values
    assert one.count("UTMASTG")
    assert one.count("USETMAXREG")
    assert not one.count("LDGSTS")


@pytest.mark.parametrize("kind", ["backward_q", "backward_kv", "diagonals"])
def test_gradients_of_a_table_are_added_atomically_by_one_of_the_three(kind: Kind) -> None:
    """What is read by distance is not added up pair by pair, where that of k and v has no room for it either."""
    found_ones = found(f"bias, {kind}, 128, sm_90").count("REDG", "ATOMG", "RED.", "ATOM.")
    assert bool(found_ones) == (kind == "diagonals")


def test_warps_that_the_compiler_did_not_divide_are_seen() -> None:
    one = found("undivided")
    assert one.count("UTMALDG")
    assert not one.is_specialized
    assert not is_sound(one, CONTROLS["undivided"])


def test_a_kernel_of_two_loops_copies_no_whole_tiles() -> None:
    one = found("forward, 128, sm_90")
    assert not one.count("UTMALDG", "UTMASTG", "USETMAXREG")


def test_tiles_that_are_too_large_are_seen_to_spill() -> None:
    assert found("spilling").spills
    assert not is_sound(found("spilling"), CONTROLS["spilling"])


def test_float32_is_not_multiplied_in_less() -> None:
    assert not found("float32").count("HGMMA", "HMMA")
    assert not found("float32").on_tensor_cores("sm_90")
    assert not is_sound(found("float32"), replace(CONTROLS["float32"], dtype="bfloat16"))  # where tensor cores are expected


def test_shared_memory_that_is_too_small_is_seen() -> None:
    one = found("forward, 128, sm_90")
    assert not is_sound(one, replace(QUICK["forward, 128, sm_90"], machine="sm_89"))


def test_what_cannot_be_compiled_is_said() -> None:
    assert isinstance(compiled()["no kernel"], CompilerError)
    with pytest.raises(CompilerError, match="Triton cannot compile a kernel"):
        compile_ahead([CONTROLS["no kernel"]])


def sound(kind: Kind, dim: int, dtype: str, machine: str, variant: str) -> Sequence[Blocks]:
    some = candidates(kind, dtype, dim, machine)
    orders = [order_of(kind, dim, dtype, machine, blocks, variant) for blocks in some]
    tried = zip(some, orders, compile_each(orders), strict=True)
    return [blocks for blocks, given, one in tried if isinstance(one, Compiled) and is_sound(one, given)]


@pytest.mark.full
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("dim", "dtype"), list(product((64, 128), ("bfloat16", "float16"))))
@pytest.mark.parametrize(
    ("variant", "kind"), [(name, kind) for name, kind in product(VARIANTS, KINDS) if kind != "diagonals" or name in WANTED]
)
def test_some_candidate_of_every_kernel_is_sound(kind: Kind, variant: str, dim: int, dtype: str, machine: str) -> None:
    found = sound(kind, dim, dtype, machine, variant)
    assert found
    if machine == "sm_90" and kind == "forward":
        assert any(blocks.specialized for blocks in found) == (variant not in UNDIVIDED)
