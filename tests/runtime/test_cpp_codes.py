"""Kernels that multiply codes of a byte, against what rounding alone costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attn_compiler import library
from attn_compiler.algebra import expr as e
from attn_compiler.algebra.storage import Storage
from attn_compiler.algebra.variant import EmptyRows, Variant
from attn_compiler.errors import ShapeError
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.site import Frame, Kind, Phase, Site
from attn_compiler.runtime import cpp
from attn_compiler.runtime.attend import attend, reference
from attn_compiler.testing import assert_within_budget

INT8 = {"qk": "int8", "pv": "int8"}
SMOOTH = {"qk": {"type": "int8", "smooth": True}, "pv": "int8"}
EXACT_CODES: list[dict[str, object]] = [
    {"qk": "int8"}, {"qk": "int4"}, {"qk": {"type": "int8", "per": "block(24)"}}, {"qk": {"type": "int8", "per": "head"}},
]  # fmt: skip
ROUNDED: list[tuple[dict[str, object], str, int]] = [  # with a mask, and the numbers of a head
    (INT8, "causal", 64), (SMOOTH, "causal & window(9)", 24), ({"pv": "int8"}, "all", 6), (INT8, "dilated(3) & causal", 6),
    ({"pv": {"type": "int8", "per": "head"}}, "causal", 64), ({"qk": "int8", "pv": "bf16"}, "causal", 24),
    ({**INT8, "kv_cache": "int8"}, "causal", 64),
]  # fmt: skip


def qkv(q_len: int = 75, k_len: int = 75, dim: int = 64, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, q_len, dim), (2, 2, k_len, dim), (2, 2, k_len, dim + 8))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", EXACT_CODES, ids=str)
def test_products_of_codes_are_those_of_what_the_codes_mean(storage: dict[str, object], dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype=dtype)
    slots = {"mask": "causal", "storage": storage}
    assert_within_budget(
        attend(q, k, v, slots, target="cpp"),
        reference(q, k, v, slots),
        attend(q, k, v, slots, target="torch"),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(("storage", "mask", "dim"), ROUNDED, ids=str)
def test_a_kernel_costs_no_more_precision_than_rounding_does(storage: dict[str, object], mask: str, dim: int) -> None:
    q, k, v = qkv(dim=dim)
    slots = {"mask": mask, "storage": storage}
    assert_within_budget(
        attend(q, k, v, slots, target="cpp"),
        reference(q, k, v, mask),
        attend(q, k, v, slots, target="torch"),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("q_len", [1, 7, 33])
def test_fewer_queries_than_keys_and_the_log_sum_exp(q_len: int) -> None:
    q, k, v = qkv(q_len=q_len)
    slots = {"mask": "causal", "storage": SMOOTH}
    ours, exact, plain = (
        attend(q, k, v, what, target=target, return_lse=True)  # type: ignore[arg-type]
        for what, target in ((slots, "cpp"), ("causal", "reference"), (slots, "torch"))
    )
    for one, other, rounded in zip(ours, exact, plain, strict=True):
        assert_within_budget(one, other, rounded)


@pytest.mark.parametrize("rule", [EmptyRows.ZERO, EmptyRows.MEAN, EmptyRows.UNMASKED])
def test_rows_that_see_nothing_get_what_the_variant_says(rule: EmptyRows) -> None:
    q, k, v = qkv()
    exact = Variant(mask=(e.q % 3 > 0) & (e.k <= e.q), empty_rows=rule)
    held = replace(exact, storage=storage_of(INT8))
    assert_within_budget(attend(q, k, v, held, target="cpp"), reference(q, k, v, exact), attend(q, k, v, held, target="torch"))  # type: ignore[arg-type]


def test_heads_are_held_each_in_its_own_way() -> None:
    q, k, v = qkv()
    slots = {"mask": "causal", "heads": {"0": {"storage": INT8}, "1:3": {"storage": {"qk": "int4"}}}}
    ours, plain = (attend(q, k, v, slots, target=target) for target in ("cpp", "torch"))
    exact = reference(q, k, v, "causal")
    for heads in (slice(0, 1), slice(1, 3), slice(3, 4)):
        assert_within_budget(ours[:, heads], exact[:, heads], plain[:, heads])


def test_channels_that_stand_out_in_k_cost_nothing_where_it_is_smoothed() -> None:
    q, k, v = (torch.randn(1, 2, 512, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    k[..., [3, 17, 40, 63]] += 8
    exact = reference(q, k, v, "causal")
    smooth, rough = (attend(q, k, v, {"mask": "causal", "storage": storage}, target="cpp") for storage in (SMOOTH, INT8))
    errors = [((found - exact).norm() / exact.norm()).item() for found in (smooth, rough)]
    assert errors[0] <= 2e-2 < errors[1]


@pytest.mark.parametrize(
    ("storage", "reason"),
    [
        ({"qk": {"type": "int8", "per": "tensor"}}, "per token, block, head"),
        ({"qk": "fp8_e4m3"}, "whole numbers of a byte"),
        ({"pv": {"type": "int8", "per": "token"}}, "per channel, head"),
        ({"qk": {"type": "int8", "outliers": 6}}, "nothing apart"),
    ],
)
def test_what_the_kernels_cannot_hold_is_refused(storage: dict[str, object], reason: str) -> None:
    with pytest.raises(ShapeError, match=reason):
        attend(*qkv(), {"storage": storage}, target="cpp")


def test_gradients_and_other_normalizers_are_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(ShapeError, match="no gradients through what is rounded"):
        attend(q.requires_grad_(), k, v, {"storage": INT8}, target="cpp")
    with pytest.raises(ShapeError, match="weights of a softmax"):
        attend(q.detach(), k, v, {"normalizer": "sigmoid", "storage": INT8}, target="cpp")


def storage_of(slots: dict[str, str]) -> Storage:
    from attn_compiler.planning.language import Scope
    from attn_compiler.planning.storing import read_storage
    from attn_compiler.planning.yaml_text import entry_of

    return read_storage(entry_of(slots), library.words(), Scope())


def site(variant: Variant, tokens: int = 4096) -> Site:
    return Site(
        "attn", Kind.SELF, Phase.PREFILL, 0, 1, 1, 8, 8, tokens, tokens, 64, 64, "bfloat16", Variant(mask=e.k <= e.q), Frame(),
        tokens, tokens,
    )  # fmt: skip


def test_training_meets_what_is_rounded_whether_that_pays_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "_coded_gain", lambda *_: 1.0)
    asked = Variant(mask=e.k <= e.q, storage=storage_of(INT8))
    refused = cpp.CppTarget().carry(replace(site(asked), phase=Phase.TRAIN), asked)
    assert refused == Refusal("cpp", "its kernels have no gradients through what is rounded")


@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_codes_that_do_not_pay_give_way_to_operands_as_they_come(gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "_coded_gain", lambda *_: gain)
    monkeypatch.setattr(cpp, "_dense_gain", lambda *_: 2.0)
    asked = Variant(mask=e.k <= e.q, storage=storage_of(INT8))
    carried = cpp.CppTarget().carry(site(asked), asked)
    assert not isinstance(carried, Refusal)
    assert carried.instead == (None if gain > 1 else Variant(mask=e.k <= e.q))
    assert ("no faster" in carried.because) is (gain == 1)
