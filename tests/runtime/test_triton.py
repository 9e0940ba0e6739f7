"""The generated Triton kernels, in Triton's interpreter, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attn_compiler.errors import ShapeError
from attn_compiler.runtime import triton_kernels
from attn_compiler.runtime.attend import attend
from attn_compiler.testing import Case, assert_case, random_case
from attn_compiler.testing.budget import assert_within_budget

pytest.importorskip("triton")

WANTED = (torch.float32, torch.bfloat16, torch.float16)
SMALL = triton_kernels.Blocks(16, 16)  # so that short sequences have many tiles


def carried(case: Case, dtype: torch.dtype) -> bool:
    """Whether the kernels carry a case; if they do, what they compute is checked."""
    with torch.no_grad():
        try:
            assert_case(case, dtype, "triton")
        except ShapeError:
            return False
    return True


@pytest.fixture(params=["small tiles", "usual tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "small tiles":
        monkeypatch.setattr(triton_kernels, "Blocks", lambda: SMALL)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.full) for n in range(20, 600, 20))])
def test_random_variants_are_within_budget(first: int) -> None:
    seeds = range(first, first + 20)
    count = sum(carried(random_case(seed), WANTED[seed % 3]) for seed in seeds)
    assert 10 * count > 9 * len(seeds)


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


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_are_within_budget(mask: str, dtype: torch.dtype) -> None:
    q, k, v = (randn(1, heads, 149, 16).to(dtype) for heads in (2, 1, 1))
    found, plain, exact = (attend(q, k, v, mask, target=target) for target in ("triton", "torch", "reference"))
    assert isinstance(found, Tensor)
    assert isinstance(plain, Tensor)
    assert isinstance(exact, Tensor)
    assert_within_budget(found, exact, plain)


def test_many_stretches_stand_in_a_list() -> None:
    assert "listed" in source("strided(64, 3)")
    assert "listed" not in source("causal & window(64)")


def source(mask: str) -> str:
    from attn_compiler import kernel_source

    text = kernel_source(mask, q_len=1024, k_len=1024, heads=2, head_dim=16, target="triton")
    return text[text.index("    for phase in") : text.index("BATCH, HEADS")]
