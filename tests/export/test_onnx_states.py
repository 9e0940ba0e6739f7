"""Exported linear attention in onnxruntime, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.algebra.variant import Variant
from attn_compiler.runtime.reading import VariantLike, read_variant
from attn_compiler.testing.budget import assert_all_within_budget
from attn_compiler.testing.case import Case, on, plain
from export.single import run

HEADS, KV_HEADS, DIM = 4, 2, 8


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def case_of(variant: VariantLike, queries: int, keys: int, tables: dict[str, Tensor] | None = None) -> Case:
    q, k, v = drawn(2, HEADS, queries, DIM, seed=0), drawn(2, KV_HEADS, keys, DIM, seed=1), drawn(2, KV_HEADS, keys, 6, seed=2)
    read = read_variant(
        variant,
        Variant(),
        heads=HEADS,
        kv_heads=KV_HEADS,
        q_len=queries,
        k_len=keys,
        head_dim=DIM,
        values=None,
        layer=0,
        layers=1,
    )
    return Case(read, q, k, v, tables or {})


def assert_right(case: Case, strategy: str, *, dynamic: bool) -> None:
    exact = on("reference")(case.to(torch.float64)).detach()
    with torch.no_grad():
        assert_all_within_budget([run(case, strategy, dynamic=dynamic)], [exact], lambda: [plain(case)])


VARIANTS = {
    "causal": {"mask": "causal", "feature": "elu_one"},
    "all": {"mask": "all", "feature": "softmax"},
    "far": {"mask": "causal & ~window(20)", "feature": "elu_one"},
    "powers": {"mask": "causal", "feature": "taylor(2)"},
    "unit": {"mask": "causal", "feature": "cosine", "normalizer": "linear(none)"},
    "faded": {"mask": "causal", "feature": "silu", "state": "decay(2 ** -(h + 1))", "normalizer": "linear(none)"},
    "faded far": {"mask": "causal & ~window(70)", "feature": "relu", "state": "decay(0.01)", "normalizer": "linear(none)"},
    "means": {"mask": "causal", "feature": "elu_one", "normalizer": "linear(mean, eps=1e-4)"},
    "inline": {"mask": "all", "scale": "1 / sqrt(dim)", "normalizer": "linear(subtract)"},
    "inline causal": {"mask": "causal", "scale": "1 / sqrt(dim)", "normalizer": "linear(subtract)"},
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("strategy", ["dense", "states"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_linear_variant_means_the_same_in_onnxruntime(name: str, strategy: str, dynamic: bool) -> None:
    for queries, keys in ((1, 1), (150, 150), (40, 150), (150, 40)) if dynamic else ((128, 128),):
        assert_right(case_of(VARIANTS[name], queries, keys), strategy, dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["causal", "far", "powers", "unit", "faded", "means", "inline causal"])
def test_onnxruntimes_own_linear_attention_is_ours(name: str, dynamic: bool) -> None:
    for length in (1, 150):
        assert_right(case_of(VARIANTS[name], length, length), "contrib", dynamic=dynamic)


@pytest.mark.parametrize("strategy", ["dense", "states"])
def test_learned_features_are_those_of_each_head(strategy: str) -> None:
    tables = {name: drawn(1, HEADS, DIM, DIM, seed=seed) for seed, name in enumerate(("hedgehog_q", "hedgehog_k"))}
    assert_right(case_of({"mask": "causal", "feature": "hedgehog"}, 150, 150, tables), strategy, dynamic=True)


@pytest.mark.parametrize("strategy", ["dense", "states"])
def test_gates_and_padding_are_tables(strategy: str) -> None:
    steps = drawn(2, HEADS, 150, seed=5).sigmoid().log()
    tables = {"gate": steps.cumsum(-1), "there": torch.arange(150) >= torch.tensor([[0], [70]])}
    gated = {"mask": "causal & valid(there)", "feature": "elu_one", "state": "gate(scalar)"}
    assert_right(case_of(gated, 150, 150, tables), strategy, dynamic=True)


@pytest.mark.parametrize("how", ["shared_denominator", "sum", "lerp"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_window_and_a_state_are_mixed(how: str, dynamic: bool) -> None:
    tables = {name: drawn(1, HEADS, DIM, DIM, seed=seed) for seed, name in enumerate(("hedgehog_q", "hedgehog_k"))}
    branches = {"near": {"mask": "causal & window(20)"}, "far": {"mask": "causal & ~window(20)", "feature": "hedgehog"}}
    weights = {"near": 0.3} if how == "lerp" else {"near": 0.5, "far": 2.0}
    mix = {"how": how, "branches": branches, "weights": weights}
    assert_right(case_of({"mix": mix}, 150, 150, tables), "branches", dynamic=dynamic)


def test_half_precision_is_only_how_numbers_are_stored() -> None:
    half = case_of(VARIANTS["causal"], 150, 150).to(torch.float16)
    case = replace(half, q=half.q.detach(), k=half.k.detach(), v=half.v.detach())
    assert run(case, "states").dtype == torch.float16
    assert_right(case, "states", dynamic=False)


class Attention(nn.Module):
    """Nothing but an attention."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_an_exported_model_gets_states_where_they_pay_and_at_every_length_that_is_not_known(tmp_path: Path) -> None:
    policy = {"version": 1, "rules": [{"match": {}, "attn": {"feature": "elu_one"}}]}
    lengths = {"short": (20, None), "long": (600, None), "any": (20, ({2: torch.export.Dim("tokens", min=2, max=4096)},))}
    bodies = {
        name: attn.export_onnx(
            Attention().eval(), (torch.randn(1, 2, length, 8),), tmp_path / f"{name}.onnx", policy, dynamic_shapes=dynamic
        ).strategies["attention"]
        for name, (length, dynamic) in lengths.items()
    }
    assert bodies == {"short": "dense", "long": "states", "any": "states"}


def test_a_hybrid_is_exported_for_any_length(tmp_path: Path) -> None:
    """The export itself compares the file with the rewritten model, at two lengths."""
    branches = {"near": {"mask": "causal & window(16)"}, "far": {"mask": "causal & ~window(16)", "feature": "elu_one"}}
    rule = {"match": {}, "attn": {"mix": {"how": "shared_denominator", "branches": branches}}}
    shapes = ({2: torch.export.Dim("tokens", min=2, max=4096)},)
    report = attn.export_onnx(
        Attention().eval(), (torch.randn(1, 2, 40, 8),), tmp_path / "hybrid.onnx", {"version": 1, "rules": [rule]},
        dynamic_shapes=shapes,
    )  # fmt: skip
    assert report.strategies == {"attention": "branches"}
    assert len(report.checks) == 2
