"""Keys and values that are codes: what they mean is what rounding makes of them, and kernels read them as they lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler.errors import ShapeError
from attn_compiler.runtime import operator
from attn_compiler.targets.rounded import held_tensor
from attn_compiler.testing import assert_within_budget

BLOCKS = {"type": "int4", "per": "block(24)"}
STORAGES: list[Any] = ["int8", "int4", "fp8_e4m3", "fp8_e5m2", "bf16", "fp16", BLOCKS, {"type": "int8", "per": "head"}]
STREAMING = "causal & (window(90) | sinks(4))"


def qkv(q_len: int = 3, k_len: int = 300, dim: int = 64, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, q_len, dim), (2, 2, k_len, dim), (2, 2, k_len, dim + 8))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


def check(q: Tensor, k: Tensor, v: Tensor, mask: str, storage: Any, target: Any = "cpp", **given: Any) -> None:
    """What codes give is within budget of what rounding operands gives."""
    slots = {"mask": mask, "storage": {"kv_cache": storage}}
    codes = attn.encode(k, storage), attn.encode(v, storage)
    with torch.no_grad():
        found = attn.attend(q, *codes, mask, target=target, return_lse=True, **given)
        exact, plain = (attn.attend(q, k, v, slots, target=at, return_lse=True, **given) for at in ("reference", "torch"))  # type: ignore[arg-type]
    for a, b, c in zip(found, exact, plain, strict=True):
        assert_within_budget(a, b, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_codes_mean_what_rounding_makes_of_numbers(storage: Any, dtype: torch.dtype) -> None:
    x = qkv(dtype=dtype)[1]
    x[0, 0, 5] = 0
    codes = attn.encode(x, storage)
    assert torch.equal(codes.decode(), held_tensor(x, codes.held).to(dtype))
    assert codes.shape == x.shape


@pytest.mark.parametrize(("storage", "bits"), [("int8", 8), ("fp8_e4m3", 8), ("int4", 4)])
def test_a_row_takes_its_bits_and_one_scale(storage: str, bits: int) -> None:
    x = torch.randn(1, 2, 50, 128).bfloat16()
    codes = attn.encode(x, storage)
    assert codes.nbytes == 2 * 50 * (128 * bits // 8 + 4)
    assert codes.nbytes <= x.nbytes * bits / 16 * 1.07


@pytest.mark.parametrize("mask", ["all", STREAMING])
@pytest.mark.parametrize(("storage", "dim"), [("int8", 64), ("int4", 64), ("fp8_e4m3", 24), ("fp8_e5m2", 40), ("bf16", 24)])
def test_few_queries_read_codes_as_they_lie(storage: str, dim: int, mask: str) -> None:
    before = operator._decoding.cache_info().misses
    check(*qkv(dim=dim), mask, storage)
    assert operator._decoding.cache_info().misses > before


@pytest.mark.full
@pytest.mark.parametrize("q_len", [1, 2, 7, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("storage", "dim"), [("int8", 6), ("int4", 6), ("fp8_e4m3", 128), ("fp8_e5m2", 13), ("fp16", 13)])
def test_any_dim_dtype_and_number_of_queries(storage: str, dim: int, dtype: torch.dtype, q_len: int) -> None:
    check(*qkv(q_len=q_len, dim=dim, dtype=dtype), "causal", storage)


def test_slices_of_many_keys_and_heads_of_several_variants() -> None:
    q, k, v = qkv(k_len=5003)
    check(q, k, v, "causal", BLOCKS)
    codes = attn.encode(k), attn.encode(v)
    groups = {"heads": {"0": {"mask": "causal & window(9)"}, "rest": {"mask": "causal & dilated(3)"}}}
    found, exact, plain = (attn.attend(q, *codes, groups, target=at) for at in ("cpp", "reference", "torch"))  # type: ignore[arg-type]
    assert_within_budget(found, exact, plain)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["cpp", "torch", "reference"])
def test_many_queries_meet_what_codes_mean(target: str) -> None:
    check(*qkv(q_len=33), STREAMING, "int8", target)


def test_codes_without_keys_to_see_give_the_mean_of_what_they_mean() -> None:
    q, k, v = qkv(k_len=40)
    variant = {"mask": "none", "empty_rows": "mean"}
    codes = attn.encode(k), attn.encode(v)
    found, exact, plain = (attn.attend(q, *codes, variant, target=at) for at in ("cpp", "reference", "torch"))  # type: ignore[arg-type]
    assert_within_budget(found, exact, plain)  # type: ignore[arg-type]


def test_codes_grow_token_by_token_into_those_of_the_whole() -> None:
    x = qkv(k_len=7)[1]
    codes = attn.encode(x[:, :, :3], "int4")
    for at in range(3, 7):
        codes = codes.append(x[:, :, at : at + 1])
    assert torch.equal(codes.rows, attn.encode(x, "int4").rows)


def test_what_no_kernel_is_for_meets_what_codes_mean() -> None:
    q, k, v = qkv()
    variant = {"mask": "causal", "normalizer": "linear", "feature": "elu_one"}
    codes = attn.encode(k), attn.encode(v)
    found, exact = attn.attend(q, *codes, variant), attn.reference(q, *codes, variant)
    plain = attn.attend(q, *codes, variant, target="torch")
    assert_within_budget(found, exact, plain)  # type: ignore[arg-type]


def test_gradients_reach_the_queries_of_codes() -> None:
    q, k, v = qkv(q_len=2)
    codes = attn.encode(k), attn.encode(v)
    ours = torch.autograd.grad(attn.attend(q.requires_grad_(), *codes, "causal").sum(), q)[0]  # type: ignore[union-attr]
    plain = attn.attend(q, codes[0].decode(), codes[1].decode(), "causal", target="torch")
    assert torch.allclose(ours, torch.autograd.grad(plain.sum(), q)[0], atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("storage", "reason"),
    [
        ({"type": "int8", "per": "channel"}, "not one for each channel"),
        ({"type": "int8", "smooth": True}, "means that are kept apart"),
        ({"type": "int8", "outliers": 6}, "channels that are kept as they are"),
        ("mxfp4", "shares scales within a row"),
    ],
)
def test_what_no_row_can_hold_is_refused(storage: Any, reason: str) -> None:
    with pytest.raises(ShapeError, match=reason):
        attn.encode(torch.randn(1, 1, 4, 32), storage)


def test_wrong_use_is_told_at_once() -> None:
    q, k, v = qkv()
    codes = attn.encode(k), attn.encode(v)
    with pytest.raises(ShapeError, match="both be codes"):
        attn.attend(q, codes[0], v, "causal")
    with pytest.raises(ShapeError, match="held in the same way"):
        attn.attend(q, codes[0], attn.encode(v, "int4"), "causal")
    with pytest.raises(ShapeError, match="the variant's cache is held in int4"):
        attn.attend(q, *codes, {"mask": "causal", "storage": {"kv_cache": "int4"}})
    with pytest.raises(ShapeError, match="cannot be appended to"):
        attn.encode(k, BLOCKS).append(k)
    with pytest.raises(ShapeError, match="an even number; found 5"):
        attn.encode(torch.randn(1, 1, 4, 5), "int4")
    with pytest.raises(ShapeError, match=r"expected real numbers \[batch, heads, tokens, dim\]"):
        attn.encode(torch.randn(4, 5))
