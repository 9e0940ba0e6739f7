"""The generated kernels for few queries: right everywhere, and they touch no key that nobody sees."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product

import pytest
import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler.errors import ShapeError
from attn_compiler.runtime import decode, operator
from attn_compiler.testing import Case, assert_case, assert_within_budget, random_case

TARGETS = ("cpp", "triton") if find_spec("triton") else ("cpp",)
WANTED = (torch.float32, torch.bfloat16, torch.float16)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def carried(case: Case, dtype: torch.dtype, target: str) -> bool:
    with torch.no_grad():
        try:
            assert_case(case, dtype, target)
        except ShapeError:
            return False
    return True


def sweep(seeds: range, target: str) -> None:
    short = ((random_case(n).last(random.Random(n).randint(1, 16)), WANTED[n % 3]) for n in seeds)
    count = sum(carried(case, dtype, target) for case, dtype in short)
    assert 10 * count > 9 * len(seeds)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.full)], ids=["some", "many"])
def test_random_variants_are_within_budget(few: bool, target: str) -> None:
    before = operator._decoding.cache_info().misses
    sweep(range(40 if target == "cpp" else 15) if few else range(200, 500), target)
    assert operator._decoding.cache_info().misses > before


def check(target: str, q: Tensor, k: Tensor, v: Tensor, variant: object, **given: object) -> None:
    """What the kernels compute, log-sum-exp included, is within budget."""
    with torch.no_grad():
        exact = attn.attend(q.double(), k.double(), v.double(), variant, target="reference", return_lse=True, **given)  # type: ignore[arg-type]
        found, plain = (attn.attend(q, k, v, variant, target=at, return_lse=True, **given) for at in (target, "torch"))  # type: ignore[arg-type]
    for a, b, c in zip(found, exact, plain, strict=True):
        assert_within_budget(a, b, c)


@pytest.mark.parametrize(("target", "q_len"), [*product(["cpp"], [1, 2, 3, 7, 16]), *product(TARGETS[1:], [1, 5])])
@pytest.mark.parametrize("mask", ["all", "causal", "causal & window(700)", "causal & (window(99) | sinks(4)) & dilated(3)"])
def test_slices_of_many_keys_are_merged(q_len: int, mask: str, target: str) -> None:
    k_len = 5003 if target == "cpp" else 403
    check(target, randn(1, 6, q_len, 8), randn(1, 2, k_len, 8), randn(1, 2, k_len, 12), mask)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rule", ["zero", "mean", "unmasked"])
def test_queries_that_see_nothing_get_what_is_asked_for(rule: str, target: str) -> None:
    variant = {"mask": "window(3) & keys('0:4')", "empty_rows": rule}
    q, k, v = randn(1, 4, 9, 8), randn(1, 2, 700, 8), randn(1, 2, 700, 8)
    with torch.no_grad():
        given = {"q_positions": 0}
        exact = attn.attend(q.double(), k.double(), v.double(), variant, target="reference", **given)  # type: ignore[arg-type]
        found, plain = (attn.attend(q, k, v, variant, target=at, **given) for at in (target, "torch"))  # type: ignore[arg-type]
    assert isinstance(found, Tensor)
    assert isinstance(exact, Tensor)
    assert isinstance(plain, Tensor)
    assert_within_budget(found, exact, plain)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dim", "value_dim"), [(1, 1), (13, 7), (40, 80), (128, 64), (256, 256)])
@pytest.mark.parametrize("dtype", WANTED)
def test_any_head_dim_is_right(dim: int, value_dim: int, dtype: torch.dtype, target: str) -> None:
    check(
        target,
        randn(1, 5, 3, dim).to(dtype),
        randn(1, 1, 150, dim).to(dtype),
        randn(1, 1, 150, value_dim).to(dtype),
        "causal & window(90)",
    )


@pytest.mark.parametrize("target", TARGETS)
def test_keys_may_stand_anywhere_as_in_a_ring(target: str) -> None:
    places = (torch.arange(64) + 23) % 64 + 1000
    check(target, randn(2, 4, 2, 8), randn(2, 2, 64, 8), randn(2, 2, 64, 8), "causal & window(40)",
          q_positions=1062, k_positions=places)  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_each_row_may_stand_elsewhere_as_in_a_static_cache(target: str) -> None:
    places = torch.tensor([[5, 6], [700, 701], [0, 900]])
    check(target, randn(3, 2, 2, 8), randn(3, 2, 901, 8), randn(3, 2, 901, 8), "causal & window(64)", q_positions=places)


UNREAD: dict[str, tuple[object, Callable[[Tensor], Tensor], dict[str, Tensor]]] = {
    "a window": ("causal & window(100)", lambda k: k > 999 - 100, {}),
    "a window and sinks": ("causal & (window(100) | sinks(4))", lambda k: (k > 999 - 100) | (k < 4), {}),
    "a dilated window": ("causal & window(300) & dilated(3)", lambda k: (k > 999 - 300) & ((999 - k) % 3 == 0), {}),
    "a document": ("same(label)", lambda k: k >= 900, {"label": (torch.arange(1000) >= 900).long()}),
    "padding": ("valid(here)", lambda k: k % 7 == 0, {"here": torch.arange(1000) % 7 == 0}),
    "a whole chunk": ("chunks(200)", lambda k: k >= 800, {}),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", UNREAD)
def test_keys_that_nobody_sees_are_not_read(name: str, target: str) -> None:
    mask, seen, tables = UNREAD[name]
    q, k, v = randn(1, 2, 1, 8), randn(1, 2, 1000, 8), randn(1, 2, 1000, 8)
    there = seen(torch.arange(1000))
    with torch.no_grad():
        expected = attn.attend(q, k, v, mask, tables=tables, target=target)  # type: ignore[arg-type]
        k[:, :, ~there], v[:, :, ~there] = math.nan, math.nan
        found = attn.attend(q, k, v, mask, tables=tables, target=target)  # type: ignore[arg-type]
    assert isinstance(found, Tensor)
    assert isinstance(expected, Tensor)
    assert found.isfinite().all()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("target", TARGETS)
def test_a_growing_cache_needs_nothing_new(target: str) -> None:
    q, k, v = randn(1, 2, 1, 8), randn(1, 2, 200, 8), randn(1, 2, 200, 8)
    check(target, q, k[:, :, :9], v[:, :, :9], "causal & window(5)")
    before = operator._decoding.cache_info().misses
    for length in range(10, 200, 19):
        check(target, q, k[:, :, :length], v[:, :, :length], "causal & window(5)")
    assert operator._decoding.cache_info().misses == before


def test_the_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "WORTH_THREADS", 0)
    q, k, v = randn(2, 6, 2, 8), randn(2, 3, 5000, 8), randn(2, 3, 5000, 8)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with torch.no_grad():
                found.append(attn.attend(q, k, v, "causal", target="cpp"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])  # type: ignore[arg-type]
