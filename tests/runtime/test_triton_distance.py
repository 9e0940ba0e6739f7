"""Gradients of tables that are read by distance: added up where tiles are equally far apart, then along diagonals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.simplify import simplify
from attn_compiler.runtime import triton_gradients
from attn_compiler.runtime.attend import Target
from attn_compiler.runtime.kernel_source import shape_of
from attn_compiler.runtime.triton_orders import order
from attn_compiler.targets.cpp.spec import FIRST_KEY, FIRST_QUERY
from attn_compiler.targets.operands import PLACE
from attn_compiler.targets.triton import gradient
from attn_compiler.targets.triton.blocks import Blocks, Kind
from attn_compiler.targets.triton.distance import DISTANCE, by_distance, leads
from attn_compiler.testing import variant_of
from attn_compiler.testing.budget import assert_all_within_budget

pytest.importorskip("triton")

RELATIVE = "score + relative(bias, 80)"
TABLES = {"bias": (2, 159), "other": (2, 8), "sink": (2,)}
ASKED: Mapping[str, Mapping[str, object]] = {
    "by distance": {"mask": "causal", "score": RELATIVE},
    "by buckets": {"mask": "all", "score": "score + buckets(other, 32, count=8)"},
    "capped, with a sink": {
        "mask": "causal & window(20)",
        "score": f"softcap({RELATIVE}, 5)",
        "normalizer": "softmax(sink=sink)",
    },
    "two tables": {"mask": "all", "score": f"{RELATIVE} + buckets(other, 32, count=8, causal=True)"},
    "one table, twice": {"mask": "causal", "score": f"{RELATIVE} + score * relative(bias, 80)"},
    "one by head as well": {"mask": "causal", "score": f"{RELATIVE} + alibi(sink)"},
    "weights of their own": {"mask": "causal", "score": RELATIVE, "normalizer": "sigmoid"},
    "norms": {"mask": "causal", "score": "cosine(0.2) + relative(bias, 80)"},
    "who sees nothing sees all": {"mask": 'offsets("3:5")', "score": RELATIVE, "empty_rows": "unmasked"},
    "who sees nothing sees the mean": {"mask": 'offsets("3:5")', "score": RELATIVE, "empty_rows": "mean"},
    "keys that stand in a list": {"mask": "strided(16, 2)", "score": RELATIVE},
    "tokens in another order": {"mask": "causal & dilated(4) & window(60)", "score": RELATIVE},
    "heads without it": {"mask": "causal", "score": RELATIVE, "heads": {"1": {"score": "score + buckets(other, 32, count=8)"}}},
    "heads that differ": {"mask": "causal", "score": RELATIVE, "heads": {"1": {"mask": "causal & window(9)"}}},
}


def gradients(asked: Any, target: Target, q_len: int = 37, k_len: int = 53, **options: object) -> tuple[Tensor, ...]:
    """Those of q, k, v and of the tables."""
    generator, dtype = torch.Generator().manual_seed(0), torch.float64 if target == "reference" else torch.float32
    shapes = [(1, 2, q_len, 16), (1, 1, k_len, 16), (1, 1, k_len, 16), *TABLES.values()]
    given = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    used = {name: x for name, x in zip(TABLES, given[3:], strict=True) if name in str(asked)}
    out = attn.attend(*given[:3], asked, tables=used, target=target, **options)
    assert isinstance(out, Tensor)
    return torch.autograd.grad(out.sin().sum(), [*given[:3], *used.values()])


def check(*call: Any, **options: Any) -> None:
    found, exact = (gradients(call[0], target, *call[1:], **options) for target in ("triton", "reference"))
    assert_all_within_budget(found, exact, lambda: gradients(call[0], "torch", *call[1:], **options))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ASKED)
def test_gradients_are_within_budget(name: str) -> None:
    check(ASKED[name])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("q_len", "k_len", "positions"), [(16, 16, None), (53, 37, 0), (1, 40, 39), (20, 40, 7)])
def test_they_are_wherever_queries_stand(q_len: int, k_len: int, positions: int | None) -> None:
    check(ASKED["by distance"], q_len, k_len, q_positions=positions)


@pytest.mark.usefixtures("small_tiles")
def test_a_long_diagonal_is_cut_into_pieces() -> None:
    assert 16 * triton_gradients.TILES < 530
    check(ASKED["by distance"] | {"mask": "causal & window(9)"}, 530, 530)


@pytest.mark.usefixtures("small_tiles")
def test_the_same_weights_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace(variant_of(ASKED["by distance"]), dropout=0.3)

    def found() -> Tensor:
        torch.manual_seed(7)
        return gradients(asked, "triton", training=True)[3]

    along = found()
    triton_gradients._pairs.cache_clear()
    gradient.by_key.cache_clear()
    for module in (gradient, triton_gradients):
        monkeypatch.setattr(module, "read_by_distance", lambda *_: {})
    by_pairs = found()
    gradient.by_key.cache_clear()
    torch.testing.assert_close(along, by_pairs)
    assert not torch.allclose(along, gradients(ASKED["by distance"], "triton")[3])


def text_of(kind: Kind, asked: Mapping[str, object]) -> str:
    shape = shape_of(asked, q_len=128, k_len=128, heads=2, head_dim=16, target="triton")
    return order(shape, kind, Blocks(16, 16), "sm_90", wanted=("bias", "sink")).text


def test_only_what_is_read_by_more_is_added_pair_by_pair() -> None:
    assert "add(of_" not in text_of("backward_kv", ASKED["by distance"])
    assert "add(of_bias, " in text_of("diagonals", ASKED["by distance"])
    both = ASKED["one by head as well"]
    assert "add(of_sink, " in text_of("backward_kv", both)
    assert "add(of_bias, " not in text_of("backward_kv", both)
    assert "add(of_sink, " not in text_of("diagonals", both)


def test_tokens_in_another_order_have_no_diagonals() -> None:
    assert "add(of_bias, " in text_of("backward_kv", ASKED["tokens in another order"])


def read(*at: Expr) -> Expr:
    return e.table("bias", *at, sort=Sort.REAL)


QUERY, KEY = e.i + FIRST_QUERY, PLACE + FIRST_KEY


def test_a_distance_is_found_in_what_is_read() -> None:
    assert by_distance(read(e.h, QUERY - KEY)) == read(e.h, DISTANCE)
    assert by_distance(read(e.where(QUERY < KEY, 0, abs(KEY - QUERY)))) is not None
    assert by_distance(read(e.i - PLACE)) is not None


@pytest.mark.parametrize(
    "at", [QUERY, KEY, QUERY + KEY, 2 * QUERY - KEY, (QUERY // 8) - (KEY // 8), e.h, QUERY * (QUERY - KEY)], ids=str
)
def test_what_depends_on_more_is_none(at: Expr) -> None:
    assert by_distance(read(at)) is None


def test_real_numbers_of_a_distance_are_computed_as_before() -> None:
    """Rounded in another order, a bucket might be another one than that of the forward kernel."""
    found = by_distance(read(e.floor(e.log(e.real(QUERY - KEY) / 8.0) / 3.0 * 8.0 + 0.5)))
    assert found == read(e.floor(e.log(e.real(DISTANCE) / 8.0) / 3.0 * 8.0 + 0.5))


MASKS = ("causal", "all", "causal & window(5)", "window(3)", 'offsets("-9:-4")', "none", "causal & sinks(2)")


@pytest.mark.parametrize("mask", MASKS)
def test_no_tile_with_a_pair_is_left_out(mask: str) -> None:
    size, variant = 4, variant_of({"mask": mask})
    for q_len, k_len, first_query, first_key in product((1, 9), (5, 12), (0, 3, 11), (0, 2)):
        some = leads(variant, (q_len, k_len), (first_query, first_key), size)
        seen = variant.mask
        for i, place in product(range(q_len), range(k_len)):
            pair = {e.q: e.const(i + first_query), e.k: e.const(place + first_key)}
            if holds(seen.substitute(pair)):
                assert i // size - place // size in some


def holds(mask: Expr) -> bool:
    return simplify(mask) == e.true


def test_what_is_known_of_distances_bounds_the_tiles() -> None:
    window = variant_of({"mask": "causal & window(5)"})
    assert leads(window, (64, 64), (0, 0), 4) == range(2)
    assert leads(window, (64, 64), None, 4) == range(-16, 17)
    assert leads(replace(window, mask=e.false), (64, 64), (0, 0), 4) == range(0)
