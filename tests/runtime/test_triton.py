"""The generated Triton kernels, forward and backward, in Triton's interpreter, against the float64 reference."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError
from attn_compiler.runtime import triton_gradients, triton_kernels
from attn_compiler.runtime.attend import Target, attend
from attn_compiler.runtime.kernel_source import shape_of
from attn_compiler.runtime.reading import read_variant
from attn_compiler.runtime.triton_launch import can_be_described
from attn_compiler.targets.triton.blocks import Blocks
from attn_compiler.testing import Case, assert_case, random_case
from attn_compiler.testing.budget import assert_within_budget

pytest.importorskip("triton")

WANTED = (torch.float32, torch.bfloat16, torch.float16)


def carried(case: Case, dtype: torch.dtype) -> bool:
    """Whether the kernels carry a case; if they do, what they compute is checked, and so are all gradients."""
    try:
        assert_case(case, dtype, "triton")
    except ShapeError:
        return False
    return True


@pytest.fixture(params=["small_tiles", pytest.param("specialized_tiles", marks=pytest.mark.full), None])
def tiles(request: pytest.FixtureRequest) -> None:
    if request.param:
        request.getfixturevalue(request.param)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.full) for n in range(10, 600, 10))])
def test_random_variants_are_within_budget(first: int) -> None:
    seeds = range(first, first + 10)
    assert sum(carried(random_case(seed), WANTED[seed % 3]) for seed in seeds) >= 8


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


MASKS = {
    "a window": "causal & window(20)",
    "a window and the first keys": "causal & (window(20) | sinks(4))",
    "a dilation": "causal & dilated(4) & window(60)",
    "many stretches, which stand in a list": "strided(16, 2)",
    "nothing hidden": "all",
    "nothing seen": "none",
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_are_within_budget(mask: str) -> None:
    q, k, v = (randn(1, 1, 149, 16) for _ in "qkv")
    meaning = read_variant(
        mask, Variant(), heads=1, kv_heads=1, q_len=149, k_len=149, head_dim=16, values=None, layer=0, layers=1
    )
    assert_case(Case(meaning, q, k, v, {}), torch.float32, "triton")


@pytest.mark.usefixtures("small_tiles")
def test_a_neighborhood_is_visited_in_squares() -> None:
    """Of a grid both queries and keys stand in the order of squares, so that few tiles hold those around a square."""
    variant, grid = {"geometry": [8, 32], "mask": "neighborhood([3, 3])"}, 8 * 32
    shape = shape_of(variant, q_len=grid, k_len=grid, heads=1, head_dim=16, target="triton")
    found = triton_kernels.kernel(shape, 0, Blocks(16, 16)).visited
    assert all(sorted(found.arrays[order]) == list(range(grid)) for order in ("q_order", "k_order"))
    assert int((found.arrays["met"][..., 1] - found.arrays["met"][..., 0]).sum()) == 88  # of 256, and 96 in order of rows
    q, k, v = (randn(1, 1, grid, 16) for _ in "qkv")
    assert_case(Case(shape.variant, q, k, v, {}), torch.float32, "triton")


SPECIALIZED: Mapping[str, tuple[object, int]] = {
    "a window": ("causal & window(20)", 16),
    "heads that are no power of two": ("causal & window(20)", 24),
    "two windows": ("window(20) & (window(5) | ~window(9))", 16),
    "keys that nobody sees": ("causal & keys('30:')", 16),
    "a bias, and no largest score": ({"mask": "causal", "score": "score + alibi()", "normalizer": "sigmoid"}, 16),
    "windows by head": ({"mask": "causal", "heads": {"0": {"mask": "causal & window(9)"}}}, 16),
}


@pytest.mark.usefixtures("specialized_tiles")
@pytest.mark.parametrize("dtype", WANTED, ids=str)
@pytest.mark.parametrize("name", SPECIALIZED)
def test_one_loop_computes_what_two_do(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = triton_kernels.load
    monkeypatch.setattr(triton_kernels, "load", lambda text: (loaded.append(text), load(text))[1])
    variant, dim = SPECIALIZED[name]
    q, k, v = randn(2, 2, 77, dim), randn(2, 1, 77, dim), randn(2, 1, 77, dim)
    meaning = read_variant(
        variant, Variant(), heads=2, kv_heads=1, q_len=77, k_len=77, head_dim=dim, values=None, layer=0, layers=1
    )
    assert_case(Case(meaning, q, k, v, {}), dtype, "triton")
    assert loaded
    assert all("warp_specialize=True" in text for text in loaded)


@pytest.mark.usefixtures("specialized_tiles")
def test_rows_that_start_anywhere_are_not_copied_tile_by_tile() -> None:
    q, k, v = (randn(1, 2, 40, 18).float()[..., 1:17] for _ in "qkv")
    targets: tuple[Target, ...] = ("triton", "reference", "torch")
    found, exact, plain = (attend(q, k, v, "causal & window(9)", target=target) for target in targets)
    assert_within_budget(found, exact, plain)
    assert not can_be_described(q)
    assert can_be_described(q.contiguous())
    assert not can_be_described(q.contiguous()[:, :, :1].expand(q.shape))


def test_a_log_sum_exp_is_that_of_the_reference() -> None:
    q, k, v = (randn(2, 2, 37, 16).float() for _ in "qkv")
    targets: tuple[Target, ...] = ("triton", "reference", "torch")
    found, exact, plain = (attend(q, k, v, "causal & window(9)", return_lse=True, target=target)[1] for target in targets)
    assert_within_budget(found, exact, plain)


def test_gradients_come_from_kernels_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    call = triton_gradients.call
    monkeypatch.setattr(
        triton_gradients, "call", lambda of, kernel, *rest: (launched.append(kernel.__name__), call(of, kernel, *rest))
    )
    q, k, v = (randn(1, 1, 20, 16).float().requires_grad_() for _ in "qkv")
    out = attend(q, k, v, "causal", target="triton")
    assert isinstance(out, Tensor)
    out.sum().backward()
    assert launched == ["backward", "backward"]


@pytest.mark.usefixtures("small_tiles")
def test_many_small_shares_add_up_to_the_gradient_of_one_number() -> None:
    """As float32, the sum of so many would be further off than that of an implementation that adds them up in pairs."""
    assert_case(random_case(237), torch.float32, "triton")


def test_what_it_refuses_is_said() -> None:
    with pytest.raises(ShapeError, match="its kernels take heads of up to 256 numbers; found 512"):
        attend(*(randn(1, 1, 4, 512).float() for _ in "qkv"), "causal", target="triton")
    with pytest.raises(ShapeError, match="found float64 on cpu"):
        attend(*(randn(1, 1, 4, 16) for _ in "qkv"), "causal", target="triton")


def test_many_stretches_stand_in_a_list() -> None:
    assert "listed" in source("strided(64, 3)")
    assert "listed" not in source("causal & window(64)")


def source(mask: str) -> str:
    from attn_compiler import kernel_source

    text = kernel_source(mask, q_len=1024, k_len=1024, heads=2, head_dim=16, target="triton")
    return text[text.index("    for phase in") : text.index("BATCH, HEADS")]
