"""Triton kernels that multiply codes, in Triton's interpreter: codes are those of the emulation, and products cost no more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler.algebra import expr as e
from attn_compiler.algebra.storage import Held
from attn_compiler.errors import ShapeError
from attn_compiler.runtime import triton, triton_coding
from attn_compiler.targets.scaled import largest_of, scaled
from attn_compiler.testing import assert_within_budget, variant_of

pytest.importorskip("triton")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT8: dict[str, Any] = {"qk": "int8", "pv": "int8"}
SMOOTH: dict[str, Any] = {"qk": {"type": "int8", "smooth": True}, "pv": "int8"}
EXACT: list[dict[str, Any]] = [  # only q and k: their products are those of what the codes mean
    {"qk": "int8"}, {"qk": "int4"}, {"qk": {"type": "int8", "per": "block(24)"}}, {"qk": {"type": "int8", "per": "head"}},
    {"qk": "fp8_e4m3"}, {"qk": {"type": "fp8_e5m2", "smooth": True}}, {"qk": "int8", "kv_cache": "int4"},
]  # fmt: skip
ROUNDED: list[dict[str, Any]] = [  # weights, too
    INT8, SMOOTH, {"pv": {"type": "int8", "per": "head"}}, {"pv": "int4"}, {"qk": "int8", "pv": "fp8_e4m3"}, {"pv": "fp8_e5m2"},
    {"qk": "int8", "pv": "bf16"}, {"qk": "int4", "pv": "fp16"}, {"kv_cache": "int8", "pv": "int8"}, {"kv_cache": "fp8_e4m3"},
]  # fmt: skip
LENGTH = 45
PLACE = torch.arange(LENGTH)
VARIANTS: Mapping[str, tuple[Mapping[str, object], Mapping[str, Tensor]]] = {
    "documents": ({"mask": "causal & same(document)"}, {"document": PLACE // 20}),
    "padding": ({"mask": "causal & valid(real)"}, {"real": torch.tensor([[40], [20]]) > PLACE}),
    "a dilation and first keys": ({"mask": "causal & (dilated(3) & window(30) | sinks(4))"}, {}),
    "a list of tiles": ({"mask": "strided(16, 2)"}, {}),
    "a score": ({"mask": "causal", "score": "softcap(score, 20) + alibi()"}, {}),
    "a bias": ({"mask": "all", "score": "score + bias[q, k]"}, {"bias": torch.linspace(-2, 2, LENGTH**2).view(LENGTH, LENGTH)}),
    "a sink": ({"mask": "causal", "normalizer": "softmax(sink=sink)"}, {"sink": torch.tensor([0.0, 1.0, -1.0, 2.0])}),
    "masks by head": ({"mask": "causal", "heads": {"0": {"mask": "causal & window(9)"}}}, {}),
    "the mean of all": ({"mask": "keys('30:') & causal", "empty_rows": "mean"}, {}),
    "as if unmasked": ({"mask": "keys('30:') & causal", "empty_rows": "unmasked"}, {}),
    "a grid": ({"geometry": [5, 9], "mask": "neighborhood(3)"}, {}),
}


def qkv(
    q_len: int = LENGTH, k_len: int = LENGTH, dim: int = 24, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, q_len, dim), (2, 2, k_len, dim), (2, 2, k_len, dim + 8))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


def attended(target: str, given: tuple[Tensor, ...], slots: object, **more: Any) -> Any:
    return attn.attend(*given, slots, target=target, **more)  # type: ignore[arg-type]


def check(given: tuple[Tensor, ...], slots: Mapping[str, object], storage: Any, **more: Any) -> None:
    """The kernels are within what rounding operands costs, all keys taken together."""
    held = {**slots, "storage": storage}
    ours, plain = (attended(target, given, held, **more) for target in ("triton", "torch"))
    assert_within_budget(ours, attended("reference", given, slots, **more), plain)


def held_as(**how: object) -> Held:
    found = variant_of({"storage": {"qk": how}}).storage.qk
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("per", ["token", "block(24)", "block(200)", "head", "channel"])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8_e4m3", "fp8_e5m2"])
def test_codes_and_scales_are_bit_for_bit_those_of_the_emulation(kind: str, per: str, smooth: bool, dtype: torch.dtype) -> None:
    how, x = held_as(type=kind, per=per, smooth=smooth), (qkv()[1] ** 3).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    x[0, 1, 5] = 0
    codes, scales, mean = triton_coding._codes(x, how, smooth=smooth)
    real = x.float()
    real = real - real.mean(-2, keepdim=True) if smooth else real
    assert how.per is not None
    expected, scale = scaled(real, how.numbers, largest_of(real, how.per))
    assert torch.equal(codes.float(), expected)
    assert torch.equal(scales, scale[..., 0, :] if per == "channel" else scale.expand(*x.shape[:3], 1)[..., 0])
    assert not smooth or torch.equal(mean, x.float().mean(-2))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", EXACT, ids=str)
def test_products_of_codes_are_those_of_what_the_codes_mean(storage: dict[str, Any], dtype: torch.dtype) -> None:
    given, slots = qkv(dtype=dtype), {"mask": "causal", "storage": storage}
    found, exact, plain = (attended(target, given, slots, return_lse=True) for target in ("triton", "reference", "torch"))
    for results in zip(found, exact, plain, strict=True):
        assert_within_budget(*results)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("q_len", [LENGTH, 33])
@pytest.mark.parametrize("size", [7, 20])
def test_blocks_are_cut_in_an_order(size: int, q_len: int) -> None:
    """Codes and scales are those of the emulation, which other tests hold to a formula; without the order they are others."""
    held = {"qk": {"type": "int8", "per": f"block({size})", "smooth": True}, "kv_cache": {"type": "fp8_e4m3", "per": "block(9)"}}
    given, slots = qkv(q_len=q_len), {"geometry": [5, 9], "order": "axes(1, 0)", "mask": "causal", "storage": held}
    slots["heads"] = {"2": {"order": "random(seed=1)"}}
    found, exact, plain = (attended(target, given, slots) for target in ("triton", "reference", "torch"))
    assert_within_budget(found, exact, plain)
    control = attended("torch", given, {"mask": "causal", "storage": held})
    assert (control - exact).abs().max() > 100 * (found - exact).abs().max()


@pytest.mark.parametrize("storage", ROUNDED, ids=str)
def test_weights_that_meet_all_keys_at_once_are_rounded_as_in_the_emulation(storage: dict[str, Any]) -> None:
    """A tile that holds all keys knows the largest score: few weights are so near to a half that they are rounded otherwise."""
    given, slots = qkv(k_len=60, q_len=60), {"mask": "causal", "storage": storage}
    exact, unrounded = attended("reference", given, slots), attended("reference", given, "causal")
    allowed = 2 * (attended("torch", given, "causal") - unrounded).abs().max() + 1e-6  # of float32
    ours, control = (((x - exact).abs() > allowed).float().mean() for x in (attended("triton", given, slots), unrounded))
    assert ours < 0.05 < 0.9 < control


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", ROUNDED, ids=str)
def test_a_kernel_costs_no_more_precision_than_rounding_does(storage: dict[str, Any], dtype: torch.dtype) -> None:
    check(qkv(dtype=dtype), {"mask": "causal"}, storage)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("storage", [SMOOTH, {"qk": "int8", "pv": "fp8_e5m2"}], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_any_variant_is_held_so(name: str, storage: dict[str, Any]) -> None:
    slots, tables = VARIANTS[name]
    check(qkv(), slots, storage, tables=tables)


@pytest.mark.parametrize(("q_len", "k_len", "dim"), [(1, 33, 6), (7, 75, 64), (33, 75, 6), (1, 75, 64), (33, 33, 24)])
def test_few_queries_and_lengths_of_any_kind(q_len: int, k_len: int, dim: int) -> None:
    check(qkv(q_len, k_len, dim), {"mask": "causal & window(40)"}, SMOOTH)


@pytest.mark.parametrize("storage", [SMOOTH, {"qk": {"type": "int8", "per": "head"}, "pv": "fp8_e4m3"}], ids=str)
@pytest.mark.parametrize("target", ["triton", "reference", "torch"])
def test_where_there_are_no_keys_there_is_nothing(target: str, storage: dict[str, Any]) -> None:
    q, k, v = qkv(k_len=0)
    assert not attended(target, (q, k, v), {"mask": "all", "storage": storage}).any()
    assert attended(target, (q[:, :, :0], k, v), {"mask": "all", "storage": storage}).shape == (2, 4, 0, 32)


def test_heads_are_held_each_in_its_own_way() -> None:
    given = qkv()
    slots = {"mask": "causal", "heads": {"0": {"storage": INT8}, "1:3": {"storage": {"qk": "int4", "pv": "fp8_e4m3"}}}}
    ours, plain, exact = attended("triton", given, slots), attended("torch", given, slots), attended("reference", given, "causal")
    for heads in (slice(0, 1), slice(1, 3), slice(3, 4)):
        assert_within_budget(ours[:, heads], exact[:, heads], plain[:, heads])


def test_channels_that_stand_out_in_k_cost_nothing_where_it_is_smoothed() -> None:
    q, k, v = (torch.randn(1, 1, 512, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    k[..., [3, 17, 40, 63]] += 16
    exact = attended("reference", (q, k, v), "causal")
    found = (attended("triton", (q, k, v), {"mask": "causal", "storage": storage}) for storage in (SMOOTH, INT8))
    errors = [((one - exact).norm() / exact.norm()).item() for one in found]
    assert errors[0] <= 2e-2 < errors[1]


def test_a_mean_that_is_not_given_back_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    codes = triton_coding._codes
    monkeypatch.setattr(triton_coding, "_codes", lambda x, how, **more: (*codes(x, how, **more)[:2], torch.zeros(2, 4, LENGTH)))
    with pytest.raises(AssertionError, match="is allowed"):
        check(
            (q, k + torch.linspace(0, 3, LENGTH)[:, None] * q.mean(), v), {"mask": "causal", "score": "softcap(score, 3)"}, SMOOTH
        )


def test_a_call_in_a_compiled_function_is_one_operator() -> None:
    given = qkv()
    slots = {"mask": "causal", "storage": SMOOTH}
    compiled = torch.compile(lambda *x: attended("triton", x, slots), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*given), attended("triton", given, slots))


def test_the_program_that_is_printed_computes_the_same() -> None:
    q, k, v = (x[:1] for x in qkv(40, 40))
    for storage in (SMOOTH, {"qk": {"type": "fp8_e4m3", "per": "block(16)"}, "pv": "fp16"}):
        slots = {"mask": "causal & same(document)", "storage": storage}
        text = attn.kernel_source(slots, q_len=40, k_len=40, heads=4, kv_heads=2, head_dim=24, target="triton")
        from attn_compiler.runtime.triton_launch import load

        document = torch.arange(40)[None] // 15
        found, _ = load(text).attend(q, k, v[..., :24], document)
        assert torch.equal(found, attended("triton", (q, k, v[..., :24]), slots, tables={"document": document}))


@pytest.mark.parametrize(
    ("storage", "reason"),
    [
        ({"qk": {"type": "int8", "per": "tensor"}}, "per token, block, head"),
        ({"qk": "bf16"}, "whole numbers and floats of a byte, not bf16"),
        ({"pv": "mxfp4"}, "not mxfp4"),
        ({"pv": {"type": "int8", "per": "token"}}, "per channel, head"),
        ({"qk": {"type": "int8", "outliers": 6}}, "nothing apart"),
    ],
)
def test_what_the_kernels_cannot_hold_is_refused(storage: dict[str, Any], reason: str) -> None:
    with pytest.raises(ShapeError, match=reason):
        attended("triton", qkv(), {"storage": storage})
    with pytest.raises(ShapeError, match=reason):
        attn.kernel_source({"storage": storage}, q_len=64, k_len=64, heads=2, head_dim=64, target="triton")


def test_gradients_norms_dropout_and_other_normalizers_are_refused() -> None:
    q, k, v = qkv()
    held = variant_of({"mask": "causal", "storage": INT8})
    for variant, reason in (
        ({"normalizer": "sigmoid", "storage": INT8}, "weights of a softmax"),
        (replace(held, dropout=0.5), "drop no weights"),
        (replace(held, score=held.score * e.q_norm), "no norms of codes"),
    ):
        with pytest.raises(ShapeError, match=reason):
            attended("triton", (q, k, v), variant, training=True)
    with pytest.raises(ShapeError, match="no gradients through what is rounded"):
        attended("triton", (q.requires_grad_(), k, v), {"storage": INT8})


def test_machines_that_know_no_e4m3_are_told_of() -> None:
    assert triton._too_old(8, 0) == "its kernels multiply floats of e4m3 on GPUs of compute capability 8.9 or more; found 8.0"
    assert triton._too_old(9, 0) is None
    assert triton.needs_e4m3(variant_of({"storage": {"pv": "fp8_e4m3"}}))
    assert not triton.needs_e4m3(variant_of({"storage": {"qk": "fp8_e5m2", "kv_cache": "fp8_e4m3"}}))
