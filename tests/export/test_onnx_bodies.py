"""The bodies of exported attentions, each as a model of its own in onnxruntime, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attn_compiler.algebra.variant import Variant
from attn_compiler.runtime.reading import read_variant
from attn_compiler.testing.budget import assert_all_within_budget
from attn_compiler.testing.case import Case, on, plain
from attn_compiler.testing.fuzz import random_case
from export.single import run

MASKS = (
    "all",
    "causal",
    "causal & window(40)",
    "causal & (window(20) | sinks(3))",
    "window(9)",
    "window(4) | sinks(10)",
    "causal & window(33) & dilated(4)",
    "dilated(3)",
    "window(50) & dilated(7)",
    "(causal & window(41) | sinks(2)) & dilated(5)",
    "causal & chunks(50)",
)


def case_of(mask: str, length: int, heads: int = 4, kv_heads: int = 2) -> Case:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, length, 16), (2, kv_heads, length, 16), (2, kv_heads, length, 8))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    variant = read_variant(
        mask, Variant(), heads=heads, kv_heads=kv_heads, q_len=length, k_len=length, head_dim=16, values=None, layer=0, layers=1
    )
    return Case(variant, q, k, v, {})


def assert_right(case: Case, strategy: str, *, dynamic: bool, known: bool = False) -> None:
    exact = on("reference")(case.to(torch.float64)).detach()
    with torch.no_grad():
        assert_all_within_budget([run(case, strategy, dynamic=dynamic, known=known)], [exact], lambda: [plain(case)])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("strategy", ["dense", "scan", "either"])
@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_means_the_same_in_onnxruntime(mask: str, strategy: str, dynamic: bool) -> None:
    assert_right(case_of(mask, 300), strategy, dynamic=dynamic)


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 256])
@pytest.mark.parametrize("mask", ["causal & (window(20) | sinks(3))", "causal & window(30) & dilated(3)"])
def test_blocks_are_right_for_every_length(mask: str, length: int) -> None:
    assert_right(case_of(mask, length), "scan", dynamic=True)
    assert_right(case_of(mask, length), "either", dynamic=True)


def assert_random_case(seed: int) -> None:
    case = random_case(seed).to(torch.float32)
    case = replace(case, tables={name: table.detach() for name, table in case.tables.items()})
    if 0 in (case.q.shape[2], case.k.shape[2]):
        return  # exported attentions have at least one query and one key
    assert_right(case, "dense", dynamic=bool(seed % 2))
    assert_right(case, "scan", dynamic=bool(seed % 2))
    assert_right(case, "listed", dynamic=False, known=bool(seed % 3))


@pytest.mark.parametrize("seed", range(60))
def test_a_random_variant_means_the_same_in_onnxruntime(seed: int) -> None:
    assert_random_case(seed)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(60, 600))
def test_random_variants_mean_the_same_in_onnxruntime(seed: int) -> None:
    assert_random_case(seed)
