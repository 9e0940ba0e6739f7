"""NaN and infinities among operands: whatever reads them is NaN as in the reference or the emulation, and nothing else is."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Sort
from attn_compiler.algebra.storage import Held
from attn_compiler.algebra.variant import Variant
from attn_compiler.runtime import coding, triton_coding
from attn_compiler.targets.rounded import held_tensor
from attn_compiler.targets.scaled import largest_of, scaled
from attn_compiler.testing import variant_of

BAD = [math.nan, -math.nan, math.inf, -math.inf]
INT8: dict[str, Any] = {"qk": "int8", "pv": "int8"}
FP8: dict[str, Any] = {"qk": "fp8_e4m3", "pv": "fp8_e4m3"}
TOKENS = (0, 11)  # the first query sees nothing else
MASK = "causal & window(9)"
BIAS = e.table("bias", e.h, e.k, sort=Sort.REAL)
PRINTED: dict[str, Any] = {
    "softcap": {"mask": "causal", "score": "softcap(score, 50)"},
    "sigmoid": {"mask": "causal", "normalizer": "sigmoid"},
    "relu": {"mask": "causal", "normalizer": "relu"},
    "gate": {"mask": "causal", "state": "gate(scalar)"},
    "min": Variant(mask=e.k <= e.q, score=e.minimum(e.score, BIAS)),
    "max": Variant(mask=e.k <= e.q, score=e.maximum(BIAS, e.score)),
}


def qkv() -> list[Tensor]:
    return list(torch.randn(3, 1, 2, 30, 16, generator=torch.Generator().manual_seed(0)))


def spoilt(given: list[Tensor], operand: int, value: float) -> list[Tensor]:
    found = [x.clone() for x in given]
    found[operand][0, 0, TOKENS, 3] = value
    return found


def assert_shows(target: Any, storage: Any, slots: dict[str, Any]) -> None:
    """Bad numbers make NaN what they do in the emulation, and leave all else bit for bit as it is without them."""
    asked = {**slots, **({"storage": storage} if storage else {})}
    clean = attn.attend(*qkv(), asked, target=target)
    for operand in range(3 if "pv" in storage else 2):
        for value in (math.nan, math.inf) if storage else (math.nan,):
            given = spoilt(qkv(), operand, value)
            found, expected = (attn.attend(*given, asked, target=one) for one in (target, "reference"))
            assert isinstance(found, Tensor)
            assert isinstance(expected, Tensor)
            assert isinstance(clean, Tensor)
            assert expected.isnan().any()
            assert not expected.isnan().all()
            assert torch.equal(found.isnan(), expected.isnan()), (operand, value)
            assert torch.equal(found[~expected.isnan()], clean[~expected.isnan()])


@pytest.mark.parametrize("storage", [{}, INT8, {"qk": "int4"}], ids=str)
def test_what_reads_a_bad_number_is_nan_in_cpp(storage: dict[str, Any]) -> None:
    assert_shows("cpp", storage, {"mask": MASK})


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("storage", [{}, INT8, {"qk": "int4"}, FP8], ids=str)
def test_what_reads_a_bad_number_is_nan_in_triton(storage: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    assert_shows("triton", storage, {"mask": MASK})


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("per", ["token", "block(7)", "head", "channel"])
@pytest.mark.parametrize("coder", ["cpp", "triton int8", "triton fp8_e4m3"])
def test_a_group_with_a_bad_number_has_nan_for_a_scale_and_codes_of_zero(coder: str, per: str, value: float) -> None:
    x = spoilt(qkv(), 0, value)[0]
    how = held_as(type=coder.partition(" ")[2] or "int8", per=per)
    if coder == "cpp":
        codes, scales, _ = coding._encoded(x, how)
    else:
        pytest.importorskip("triton")
        codes, scales, _ = triton_coding._codes(x, how)
    assert how.per is not None
    expected, scale = scaled(x, how.numbers, largest_of(x, how.per))
    scale = scale[..., 0, :] if per == "channel" else scale.expand(*x.shape[:3], 1)[..., 0]
    assert torch.equal(codes.float(), expected)
    assert scale.isnan().any()
    assert not scale.isnan().all()
    torch.testing.assert_close(scales, scale, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("storage", ["int8", "int4", "fp8_e4m3", "fp8_e5m2"])
def test_rows_of_codes_tell_of_bad_numbers(storage: Any, value: float) -> None:
    x = spoilt(qkv(), 1, value)[1]
    assert_told(x, storage)


@pytest.mark.filterwarnings("ignore:numbers beyond the `largest`")
def test_rows_of_a_fixed_scale_tell_of_what_cannot_be_cut_off() -> None:
    assert_told(spoilt(qkv(), 1, math.nan)[1], {"type": "int8", "largest": 4})


def assert_told(x: Tensor, storage: Any) -> None:
    rows = attn.encode(x, storage)
    torch.testing.assert_close(rows.decode(), held_tensor(x, rows.held), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(rows.decode().isnan().all(-1), ~x.isfinite().all(-1))


def held_as(**how: object) -> Held:
    found = variant_of({"storage": {"qk": how}}).storage.qk
    assert found is not None
    return found


@pytest.mark.parametrize("target", ["cpp", "triton"])
def test_few_queries_that_see_bad_rows_of_codes_are_nan(target: Any) -> None:
    q, k, v = spoilt(qkv(), 1, math.nan)
    rows = attn.encode(k, "int8"), attn.encode(v, "int8")
    for mask in ("all", "keys(':1')", "keys('1:11')"):
        found = attn.attend(q[:, :, -2:], *rows, mask, target=target)
        expected = attn.attend(q[:, :, -2:], k, v, mask, target="reference")
        assert isinstance(found, Tensor)
        assert isinstance(expected, Tensor)
        assert expected.isnan().any() == (mask != "keys('1:11')")
        assert torch.equal(found.isnan(), expected.isnan())


def of_printed(name: str, target: Any, operand: str, value: float) -> list[Tensor]:
    """The result and its gradient in q, where token 11 of the first head has one bad number in its key or in a table."""
    q, k, v = qkv()
    table = -torch.rand(2, 30, generator=torch.Generator().manual_seed(1))
    (k[0, 0, :, 3] if operand == "k" else table[0])[11] = value
    tables = {"gate": table[None]} if name == "gate" else {"bias": table} if name in ("min", "max") else {}
    q.requires_grad_()
    found = attn.attend(q, k, v, PRINTED[name], tables=tables, target=target)
    assert isinstance(found, Tensor)
    return [found.detach(), *torch.autograd.grad(found.sum(), q)]


@pytest.mark.parametrize(
    ("name", "operand"), [*((name, "k") for name in PRINTED), *((name, "table") for name in ("gate", "min", "max"))]
)
def test_what_is_printed_keeps_nan_in_cpp(name: str, operand: str) -> None:
    found, expected = (of_printed(name, target, operand, math.nan) for target in ("cpp", "reference"))
    assert expected[0][0, 0, 11:].isnan().all()
    assert not expected[0][0, 0, :11].isnan().any()
    torch.testing.assert_close(found[0], expected[0].to(found[0].dtype), rtol=1e-4, atol=1e-4, equal_nan=True)
    assert torch.equal(*(gradient[0, 0, 11:].isnan() for _, gradient in (found, expected)))
    assert not found[1][0, 1].isnan().any()


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("name", ["softcap", "sigmoid"])
def test_a_bounded_function_of_infinity_is_its_limit_in_cpp(name: str, value: float) -> None:
    found, expected = (of_printed(name, target, "k", value)[0] for target in ("cpp", "reference"))
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-4, atol=1e-4)


def test_what_is_printed_keeps_nan_in_triton() -> None:
    """The interpreter keeps it in any case, so the text must say so."""
    for name in ("min", "max"):
        source = attn.kernel_source(PRINTED[name], q_len=512, k_len=512, heads=2, head_dim=64, target="triton")
        assert re.search(rf"tl\.{name}imum\(.*, tl\.PropagateNan\.ALL\)", source)
