"""The bodies of exported attentions, each as a model of its own in onnxruntime, against the float64 reference."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator

from attn_compiler.algebra.variant import Variant
from attn_compiler.runtime.reading import VariantLike, read_variant
from attn_compiler.targets.onnx.fit import refusal
from attn_compiler.targets.onnx.opsets import OPSET
from attn_compiler.testing.budget import assert_all_within_budget
from attn_compiler.testing.case import Case, on, plain
from attn_compiler.testing.fuzz import random_case
from export.single import run, spec_of

CAUSAL = {"mask": "causal"}
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


def case_of(mask: VariantLike, length: int, heads: int = 4, kv_heads: int = 2, value_dim: int = 8) -> Case:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, length, 16), (2, kv_heads, length, 16), (2, kv_heads, length, value_dim))
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
@pytest.mark.parametrize("strategy", ["dense", "scan", "either", "batched", "matmul"])
@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_means_the_same_in_onnxruntime(mask: str, strategy: str, dynamic: bool) -> None:
    assert_right(case_of(mask, 300), strategy, dynamic=dynamic)


@pytest.mark.parametrize("strategy", ["dense", "scan", "listed", "matmul"])
def test_scores_need_not_ask_queries_and_keys(strategy: str) -> None:
    assert_right(case_of({"mask": "causal & window(40)", "score": "alibi"}, 300), strategy, dynamic=strategy != "listed")


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 256])
@pytest.mark.parametrize("mask", ["causal & (window(20) | sinks(3))", "causal & window(30) & dilated(3)"])
def test_blocks_are_right_for_every_length(mask: str, length: int) -> None:
    assert_right(case_of(mask, length), "scan", dynamic=True)
    assert_right(case_of(mask, length), "either", dynamic=True)
    assert_right(case_of(mask, length), "matmul", dynamic=True)
    assert_right(case_of(mask, length), "batched", dynamic=True)


def assert_random_case(seed: int) -> None:
    case = random_case(seed).to(torch.float32)
    case = replace(case, tables={name: table.detach() for name, table in case.tables.items()})
    if 0 in (case.q.shape[2], case.k.shape[2]):
        return  # exported attentions have at least one query and one key
    assert_right(case, "dense", dynamic=bool(seed % 2))
    assert_right(case, "scan", dynamic=bool(seed % 2))
    assert_right(case, "listed", dynamic=False, known=bool(seed % 3))
    for strategy in ("batched", "matmul"):
        for dynamic in (False, True):
            if not refusal(spec_of(case, dynamic=dynamic)[0], strategy, OPSET):
                assert_right(case, strategy, dynamic=dynamic, known=bool(seed % 3))


@pytest.mark.parametrize("seed", range(24))
def test_a_random_variant_means_the_same_in_onnxruntime(seed: int) -> None:
    assert_random_case(seed)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(24, 600))
def test_random_variants_mean_the_same_in_onnxruntime(seed: int) -> None:
    assert_random_case(seed)


@pytest.mark.parametrize("strategy", ["dense", "scan", "listed", "batched", "matmul"])
def test_half_precision_is_only_how_numbers_are_stored(strategy: str) -> None:
    half = case_of("causal & (window(20) | sinks(3))", 300).to(torch.float16)
    case = replace(half, q=half.q.detach(), k=half.k.detach(), v=half.v.detach())
    out = run(case, strategy)
    assert out.dtype == torch.float16
    assert_right(case, strategy, dynamic=False)


def as_onnx_says(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Attention of opset 25, which has windows, in ONNX's own reference."""
    element = helper.np_dtype_to_tensor_dtype(q.numpy().dtype)
    inputs = [helper.make_tensor_value_info(name, element, None) for name in "qkvo"]
    node = helper.make_node("Attention", ["q", "k", "v"], ["o"], is_causal=1, left_window_size=window - 1, right_window_size=-1)
    graph = helper.make_graph([node], "attention", inputs[:3], inputs[3:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=11)
    (out,) = ReferenceEvaluator(model).run(None, {"q": q.numpy(), "k": k.numpy(), "v": v.numpy()})
    return torch.from_numpy(out)


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.full) for seed in range(5, 100))])
def test_a_random_window_is_that_of_onnx(seed: int) -> None:
    draw = random.Random(seed)
    window, length = draw.randint(1, 200), draw.randint(1, 400)
    case = case_of(f"causal & window({window})", length, heads := draw.choice((1, 2, 4)), heads)
    exact = as_onnx_says(case.q.double(), case.k.double(), case.v.double(), window)
    for strategy in ("dense", "scan", "either", "listed", "batched", "matmul"):
        assert_all_within_budget([run(case, strategy)], [exact], lambda: [as_onnx_says(case.q, case.k, case.v, window)])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "mask",
    [
        "causal",
        "causal & window(40)",
        "causal & window(1)",
        {"heads": {"0:2": {"mask": "causal & window(9)"}, "rest": {"mask": "causal"}}},
    ],
    ids=str,
)
def test_onnxruntimes_own_windows_are_ours(mask: VariantLike, dynamic: bool) -> None:
    assert_right(case_of(mask, 300, value_dim=16), "contrib", dynamic=dynamic)
