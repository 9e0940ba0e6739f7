"""Branches of a mix, each by a kernel of its own, against the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.planner import Carried
from attn_compiler.planning.site import Frame, Kind, Phase, Site
from attn_compiler.runtime import cpp, triton
from attn_compiler.runtime.targets import TARGETS
from attn_compiler.testing import assert_case, drawn_case, variant_of

NEAR, FAR = {"mask": "causal & window(9)"}, {"mask": "causal & ~window(9)"}
LINEAR = {**FAR, "feature": "elu_one"}
TABLES = {"amount": torch.rand(4), "bias": torch.randn(4, 50, 50), "logits": torch.randn(4)}
BIASED = {**NEAR, "score": "score + bias[h, q, k]"}


def mix(how: str, near: Mapping[str, object] = NEAR, far: Mapping[str, object] = FAR, **more: object) -> dict[str, Any]:
    return {"mix": {"how": how, "branches": {"near": near, "far": far}, **more}}


VARIANTS: dict[str, tuple[dict[str, Any], int]] = {  # and how many branches kernels of softmax attend in
    "two halves of a softmax": (mix("lse"), 2),
    "a part of a softmax that weighs less": (mix("lse", far={"mask": "causal & dilated(4)"}, weights={"far": "amount"}), 2),
    "a bias that is trained, and all keys": (mix("lse", BIASED, {"mask": "all"}), 2),
    "a window, and what is linear beyond": (mix("sum", far=LINEAR), 1),
    "the same with a gate": (mix("gate", far=LINEAR, weights={"near": "logits"}), 1),
    "one that kernels do not have": (mix("lerp", far={"mask": "causal", "normalizer": "local_linear"}, weights={"far": 0.3}), 1),
}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[Variant]:
    """The branches that kernels attended in."""
    seen: list[Variant] = []
    for module in (cpp, triton):
        run = module.attend_generated

        def noted(operands: Any, variant: Variant, *rest: Any, _run: Any = run, **more: Any) -> Any:
            seen.append(variant)
            return _run(operands, variant, *rest, **more)

        monkeypatch.setattr(module, "attend_generated", noted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_branches_by_kernels_are_the_mix(name: str, dtype: torch.dtype, kernels: list[Variant]) -> None:
    slots, count = VARIANTS[name]
    for queries in (50, 7):
        kernels.clear()
        assert_case(drawn_case(slots, TABLES, queries, 50), dtype, "cpp")
        assert len(kernels) == count


@pytest.mark.parametrize("name", VARIANTS)
def test_triton_s_kernels_as_well(name: str, kernels: list[Variant], small_tiles: None) -> None:
    pytest.importorskip("triton")
    slots, count = VARIANTS[name]
    assert_case(drawn_case(slots, TABLES, 50, 50), torch.float32, "triton")
    assert len(kernels) == count


@pytest.mark.parametrize(("target", "length"), [("cpp", 260), ("triton", 50), ("torch", 50)])
def test_a_mix_of_some_heads_reads_what_is_theirs(target: str, length: int) -> None:
    slots = {"heads": {"2:": mix("sum", BIASED, LINEAR), "rest": NEAR}}
    case = drawn_case(slots, {"bias": torch.randn(4, length, length)}, length, length)
    assert_case(case, torch.float32, target)


def test_a_plan_says_how_each_branch_attends() -> None:
    where = Site("attn", Kind.SELF, Phase.PREFILL, 0, 1, 2, 4, 4, 1024, 1024, 64, 64, "float32", Variant(), Frame(), 1024, 1024)
    found = TARGETS["cpp"].carry(where, variant_of(VARIANTS["one that kernels do not have"][0]))
    assert found == Carried("far: PyTorch's operators; near: a generated kernel", gains=True)
