"""Delta rules, and gates of single features, in onnxruntime: against the float64 reference, which solves one system for all."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler.targets.onnx.fit import refusal
from attn_compiler.targets.onnx.opsets import OPSET
from attn_compiler.testing import assert_within_budget, variant_of
from end_to_end.test_state_traits import ready, trained
from export.single import spec_of
from export.test_onnx_states import HEADS, Attention, assert_right, case_of
from export.test_recalled_decoding import in_parallel, llama, text

RULES = {
    "delta": {"feature": "cosine", "state": "delta", "mask": "causal"},
    "delta, sums of one": {"feature": "softmax", "state": "delta", "mask": "causal", "scale": "1 / sqrt(dim)"},
    "delta, far": {"feature": "cosine", "state": "delta", "mask": "causal & ~window(20)"},
    "gated": {"feature": "cosine", "state": "gated_delta", "mask": "causal", "scale": "1 / sqrt(dim)"},
    "gated, padded": {"feature": "cosine", "state": "gated_delta", "mask": "causal & valid(padding)"},
    "gla": {"state": "gate(vector)", "mask": "causal", "normalizer": "linear(none)", "scale": "1 / sqrt(dim)"},
    "gates, mapped": {"feature": "elu_one", "state": "gate(vector)", "mask": "causal"},
    "gates, padded": {"feature": "elu_one", "state": "gate(vector)", "mask": "causal & valid(padding)"},
    "gates, counted": {"feature": "elu_one", "state": "gate(vector)", "mask": "causal", "normalizer": "linear(mean)"},
    "gates, far": {"feature": "elu_one", "state": "gate(vector)", "mask": "causal & ~window(12)"},
    "gates, near": {"feature": "elu_one", "state": "gate(vector)", "mask": "causal & window(12)"},
}
MIXED = {
    "how": "shared_denominator",
    "branches": {
        "near": {"mask": "causal & window(9)"},
        "far": {"mask": "causal", "feature": "elu_one", "state": "gate(vector)"},
    },
}
CORRECTED = {
    "how": "shared_denominator",
    "branches": {"near": {"mask": "causal & window(9)"}, "far": {"mask": "causal", "feature": "softmax", "state": "delta"}},
}
BY_HEAD = {"0:2": {"mask": "causal & window(9)"}, "rest": {"mask": "causal", "feature": "elu_one", "state": "gate(vector)"}}


def tables_of(slots: object, tokens: int, closed: float = 3.0) -> dict[str, Tensor]:
    """Gates some of which are all but closed for a token."""
    numbers = torch.rand(2, HEADS, tokens, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logs = torch.where(numbers < 0.03, -closed, numbers.sigmoid().log()).cumsum(2)
    tables = {
        "beta": torch.rand(2, HEADS, tokens, generator=torch.Generator().manual_seed(4)),
        "gate": logs if "vector" in str(slots) else logs[..., 0].contiguous(),
        "padding": torch.arange(tokens) >= torch.tensor([[0], [min(37, tokens - 1)]]),
    }
    return {name: tables[name] for name in variant_of(slots).tables()}  # type: ignore[arg-type]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("strategy", ["dense", "states"])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_means_the_same_in_onnxruntime(name: str, strategy: str, dynamic: bool) -> None:
    slots = RULES[name]
    for queries, keys in ((1, 1), (5, 5), (64, 64), (150, 150), (40, 150), (200, 150)):
        assert_right(case_of(slots, queries, keys, tables_of(slots, keys)), strategy, dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", [name for name in RULES if "near" not in name and name != "gates, far"])
def test_onnxruntimes_own_linear_attention_gathers_what_keys_add(name: str, dynamic: bool) -> None:
    slots = RULES[name]
    for length in (1, 150):
        case = case_of(slots, length, length, tables_of(slots, length))
        assert refusal(spec_of(case)[0], "contrib", OPSET) is None
        assert_right(case, "contrib", dynamic=dynamic)


@pytest.mark.parametrize("name", ["gated", "gla", "gates, mapped"])
def test_gates_may_close_all_but_wholly_in_a_long_text(name: str) -> None:
    """Logs then differ by thousands within a chunk, where exp(-log) of single tokens would overflow."""
    slots = RULES[name]
    assert_right(case_of(slots, 1000, 1000, tables_of(slots, 1000, closed=300.0)), "states", dynamic=True)


def test_keys_that_are_all_the_same_are_learned_one_after_the_other() -> None:
    """Powers of this system reach 10 ** 17, while its inverse holds 1 and -1."""
    case = case_of(RULES["delta"], 150, 150, {"beta": torch.ones(2, HEADS, 150)})
    case.k.data.copy_(case.k[:, :, :1].expand_as(case.k))
    assert_right(case, "states", dynamic=False)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("slots", [{"mix": MIXED}, {"mix": CORRECTED}, {"heads": BY_HEAD}], ids=["gates", "delta", "heads"])
def test_a_rule_stands_beside_a_window(slots: dict[str, object], dynamic: bool) -> None:
    strategy = "branches" if "mix" in slots else "states"
    assert_right(case_of(slots, 150, 150, tables_of(slots, 150)), strategy, dynamic=dynamic)


def test_half_precision_is_only_how_numbers_are_stored() -> None:
    for name in ("gated", "gla"):
        case = case_of(RULES[name], 150, 150, tables_of(RULES[name], 150))
        for x in (case.q, case.k, case.v):
            x.data = x.data.half()
        assert_right(case, "states", dynamic=False)


@pytest.mark.parametrize("strategy", ["scan", "listed", "batched", "matmul"])
def test_scores_are_nobodys_where_features_fade_apart(strategy: str) -> None:
    spec, _ = spec_of(case_of(RULES["gates, near"], 64, 64, tables_of(RULES["gates, near"], 64)))
    assert refusal(spec, strategy, OPSET) == "each of its features fades by itself, so its weights are no products of q and k"


@pytest.mark.parametrize("name", ["delta", "gated", "gla"])
def test_an_exported_model_is_checked_beside_its_rewritten_form(name: str, tmp_path: Path) -> None:
    slots = RULES[name]
    tables = {one: x[:1, :2] for one, x in tables_of(slots, 200).items()}
    rule = {"match": {}, "attn": slots, "fallback": "error"}
    policy = {"version": 1, "labels": {one: {"given": one} for one in tables}, "rules": [rule]}
    report = attn.export_onnx(Attention().eval(), (torch.randn(1, 2, 200, 8),), tmp_path / "model.onnx", policy, tables=tables)
    assert report.strategies == {"attention": "states"}
    assert len(report.checks) == 1


@pytest.mark.parametrize("name", ["lizard", "gla", "infinitevl"])
def test_a_ready_policy_is_exported_with_all_that_it_reads_of_the_input_of_a_block(name: str, tmp_path: Path) -> None:
    """A branch on q and k before the rotary embedding stands beside one behind it."""
    model = llama(1)
    policy, ids = trained(model, ready(name), tmp_path), text(2, 70)
    attn.export_onnx(model, (ids,), tmp_path / "model.onnx", policy, kwargs={"use_cache": False})
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    plain = in_parallel(model, policy, ids)
    assert_within_budget(torch.from_numpy(found), in_parallel(model.double(), policy, ids), plain)
