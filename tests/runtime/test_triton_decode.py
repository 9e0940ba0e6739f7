"""Few queries and many keys: slices are cut from what tables show, not from all keys."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler.runtime import triton_decode
from attn_compiler.testing.budget import assert_within_budget

pytest.importorskip("triton")

LENGTH, TILE = 500, 64
PLACE = torch.arange(LENGTH)
CASES: Mapping[str, tuple[object, Mapping[str, Tensor], list[tuple[int, int]]]] = {
    "a document": ("same(label)", {"label": torch.stack([PLACE // 350, PLACE // 498])}, [(5, 8), (7, 8)]),
    "padding": ("causal & valid(here)", {"here": (PLACE >= 130) & (torch.tensor([[200], [500]]) > PLACE)}, [(2, 4), (2, 8)]),
    "a window and first keys": (
        "causal & (window(90) | sinks(4)) & valid(here)",
        {"here": (torch.tensor([[450], [3]]) > PLACE)},
        [(0, 8), (0, 1)],
    ),
    "padding alone": ({"mask": "valid(here)", "empty_rows": "mean"}, {"here": torch.zeros(2, LENGTH).bool()}, [(8, 8), (8, 8)]),
}


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """Between which tiles of keys each launch has cut its slices."""
    found: list[Tensor | None] = []
    limits_of = triton_decode._limits
    monkeypatch.setattr(triton_decode, "LONG", 100)
    monkeypatch.setattr(triton_decode, "_limits", lambda *given: (found.append(limits_of(*given)), found[-1])[1])
    return found


@pytest.mark.parametrize("name", CASES)
def test_slices_are_cut_from_what_some_query_sees(name: str, limits: list[Tensor | None]) -> None:
    variant, tables, expected = CASES[name]
    q, k, v = torch.randn(2, 4, 2, 16), torch.randn(2, 2, LENGTH, 16), torch.randn(2, 2, LENGTH, 16)
    with torch.no_grad():
        found, exact, plain = (
            attn.attend(q, k, v, variant, tables=tables, target=target)  # type: ignore[arg-type]
            for target in ("triton", "reference", "torch")
        )
    assert_within_budget(found, exact, plain)  # type: ignore[arg-type]
    [asked] = limits
    assert asked is not None
    assert [tuple(row) for row in asked[:, :2].tolist()] == expected


def test_nothing_is_asked_where_no_table_decides(limits: list[Tensor | None]) -> None:
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, LENGTH, 16)
    attn.attend(q, k, k, "causal & window(90)", target="triton")
    assert limits == [None]


def test_few_keys_are_not_asked_about(limits: list[Tensor | None]) -> None:
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 90, 16)
    attn.attend(q, k, k, "valid(here)", tables={"here": torch.ones(1, 90).bool()}, target="triton")
    assert not limits
