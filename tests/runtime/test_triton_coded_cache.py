"""Caches of codes that the Triton kernels for few queries read as they lie, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler.algebra.storage import Storage
from attn_compiler.runtime import operator, triton_decode, triton_kernels
from attn_compiler.runtime.kernel_source import shape_of
from attn_compiler.runtime.triton_launch import in_words
from attn_compiler.targets.rows import Codes
from attn_compiler.targets.triton.blocks import Blocks
from attn_compiler.testing import assert_within_budget

pytest.importorskip("triton")

STORAGES: list[Any] = ["int8", "int4", "fp8_e4m3", "fp8_e5m2", "bf16", "fp16", {"type": "int4", "per": "block(24)"}]
HERE = torch.tensor([[149], [3]]) > torch.arange(150)
STREAMING = "causal & (window(90) | sinks(4))"


def qkv(q_len: int, dim: int = 24, dtype: torch.dtype = torch.float32, k_len: int = 150) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, q_len, dim), (2, 2, k_len, dim), (2, 2, k_len, dim + 8))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


def check(given: tuple[Tensor, Tensor, Tensor], slots: dict[str, Any], storage: Any, *codes: Codes, **more: Any) -> None:
    """What codes give is within budget of what rounding operands gives."""
    q, k, v = given
    held = {**slots, "storage": {"kv_cache": storage}}
    found = attn.attend(q, *(codes or (attn.encode(k, storage), attn.encode(v, storage))), slots, target="triton", **more)
    exact, plain = (attn.attend(q, k, v, held, target=target, **more) for target in ("reference", "torch"))  # type: ignore[arg-type]
    for results in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, exact, plain)), strict=True):
        assert_within_budget(*results)


@pytest.mark.parametrize(("dtype", "q_len"), [(torch.float32, 7), (torch.bfloat16, 1), (torch.float16, 3)], ids=str)
@pytest.mark.parametrize("dim", [6, 24])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_few_queries_read_codes_as_they_lie(
    storage: Any, dim: int, q_len: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[torch.dtype] = []
    run = triton_decode.run
    monkeypatch.setattr(triton_decode, "run", lambda *given: (read.append(given[2].dtype), run(*given))[1])
    check(qkv(q_len, dim, dtype), {"mask": STREAMING}, storage, return_lse=True)
    assert read == [{"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(storage), torch.uint8)]


def test_every_code_of_a_byte_means_what_it_means_in_pytorch() -> None:
    """Each of the 254 numbers of a type is a value once, and a query that sees only its key gets it."""
    for kind, of in (("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2), ("int8", torch.int8)):
        numbers = torch.arange(256, dtype=torch.uint8).view(of).float()
        numbers = numbers[numbers.isfinite() & (numbers != -128)]
        rows = torch.stack([numbers, torch.full_like(numbers, numbers.max())], -1).repeat(1, 4)[None, None]
        codes = attn.encode(rows, kind)
        q = torch.zeros(1, 1, len(numbers), 8)
        for start in range(0, len(numbers), 16):
            some = slice(start, start + 16)
            found = attn.attend(q[:, :, some], codes, codes, "window(1)", q_positions=start, target="triton")
            assert torch.equal(found, codes.decode()[:, :, some])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["tables", "heads", "nothing seen"])
def test_any_mask_and_score(name: str) -> None:
    slots, tables = {
        "tables": ({"mask": "causal & valid(here)", "score": "score + alibi()"}, {"here": HERE}),
        "heads": ({"heads": {"0": {"mask": "causal & window(9)"}, "rest": {"mask": "causal & dilated(3)"}}}, {}),
        "nothing seen": ({"mask": "none", "empty_rows": "mean"}, {}),
    }[name]  # fmt: skip
    q, k, v = qkv(3)
    codes = attn.encode(k), attn.encode(v)
    found = attn.attend(q, *codes, slots, tables=tables, target="triton")
    exact, plain = (attn.attend(q, *codes, slots, tables=tables, target=target) for target in ("reference", "torch"))  # type: ignore[arg-type]
    assert_within_budget(found, exact, plain)  # type: ignore[arg-type]


def test_rows_of_a_cache_that_is_larger_lie_anywhere() -> None:
    given = qkv(2)
    rows = [attn.encode(x).rows for x in given[1:]]
    cut = [Codes(torch.cat([one, one], 2)[:, :, :150], attn.encode(given[1]).held, torch.float32) for one in rows]
    odd = [Codes(torch.nn.functional.pad(one, (1, 0))[..., 1:], cut[0].held, torch.float32) for one in rows]
    for k, v in (cut, odd):
        check(given, {"mask": "causal"}, "int8", k, v)
    assert all(in_words(one.rows) is one.rows for one in cut)
    for one in (*odd, Codes(odd[0].rows.contiguous().view(-1)[1:][:168].view(1, 1, 6, 28), cut[0].held, torch.float32)):
        found = in_words(one.rows)
        assert all(start % 4 == 0 for start in (found.data_ptr(), *found.stride()[:3]))
        assert torch.equal(found, one.rows)


def test_what_a_clock_would_measure_on_a_device_runs() -> None:
    """Numbers of its own, encoded as a cache would, or as operands are held."""
    device = torch.device("cpu")
    shape = shape_of({"mask": "causal"}, q_len=2, k_len=40, heads=4, kv_heads=2, head_dim=16, target="triton")
    held = attn.encode(torch.zeros(1, 1, 1, 16), "int4").held
    [one] = triton_decode.launches(replace(shape, variant=replace(shape.variant, storage=Storage(kv_cache=held))))
    assert one.spec.rows == "whole4"
    with mock.patch.object(triton_decode, "TRIED", 64):
        triton_decode._attempt(one, 2, device, Blocks(16, 32))()
    storage = {"qk": {"type": "int8", "smooth": True}, "pv": "int8"}
    shape = shape_of({"mask": "causal", "storage": storage}, q_len=40, k_len=40, heads=2, head_dim=16, target="triton")
    triton_kernels._attempt(shape, 0, device, Blocks(32, 32))()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_queries_meet_what_codes_mean(dtype: torch.dtype) -> None:
    check(qkv(33, dtype=dtype), {"mask": STREAMING}, "int8")


def test_a_scale_that_is_read_wrongly_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(2)
    codes, wrong = attn.encode(k), attn.encode(v)
    wrong.rows[0, 0, 70, -4] ^= 0x80
    wrong.rows[0, 0, 70, -2] ^= 0x40
    with pytest.raises(AssertionError, match="is allowed"):
        check((q, k, v), {"mask": "all"}, "int8", codes, wrong)


def test_gradients_and_norms_go_by_what_codes_mean() -> None:
    q, k, v = qkv(2)
    codes = attn.encode(k), attn.encode(v)
    given = q.requires_grad_(), codes[0].decode(), codes[1].decode()
    ours = attn.attend(q, *codes, "causal", target="triton")
    plain = attn.attend(*given, "causal", target="torch")
    found, expected = (torch.autograd.grad(x.sum(), q)[0] for x in (ours, plain))  # type: ignore[union-attr]
    assert torch.allclose(found, expected, atol=1e-5)


def test_each_target_has_a_word_of_its_own_for_codes() -> None:
    assert operator.CODES["cpp"] == "codes"  # graphs of earlier versions hold it
    assert {operator._OF_CODES[word]: word for word in operator.CODES.values()} == operator.CODES
    assert not operator.CODES.keys() & operator.CODES.values()
