"""Real models with and without policies in MLIR, run by torch-mlir's execution engine, against attention rewritten by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler.export.mlir.engine import Engine
from attn_compiler.testing.budget import assert_all_within_budget
from end_to_end.models import double
from export.real_models import MODELS

pytest.importorskip("torch_mlir", reason="torch-mlir has no wheel for this platform")
QUICK = ("bert", "mistral", "vit")
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in MODELS]
LENGTH = 96


@pytest.mark.parametrize("name", CASES)
def test_a_model_with_a_policy_computes_in_mlir_what_it_does_by_hand(name: str, tmp_path: Path) -> None:
    case, path = MODELS[name], tmp_path / "model.mlir"
    model, traced, inputs = case.made(), case.inputs(2, LENGTH), case.inputs(2, LENGTH)
    report = attn.export_mlir(model, (), path, case.policy, kwargs=traced, vmfb=False)
    assert "approximate" in {decision.outcome for decision in report.report.decisions}
    run = case.rewritten(inputs)
    with torch.no_grad():
        exact = run(double(model))
        actual = Engine(path, "linalg").run("main", [x for x in inputs.values() if isinstance(x, Tensor)])
        assert_all_within_budget(actual[:1], [exact], lambda: [run(model)])


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_a_policy_computes_in_mlir_what_it_does_eagerly(name: str, tmp_path: Path) -> None:
    case, path = MODELS[name], tmp_path / "model.mlir"
    model, inputs = case.made(), case.inputs(2, LENGTH)
    attn.export_mlir(model, (), path, kwargs=inputs, vmfb=False)
    run = case.eager(inputs)
    with torch.no_grad():
        exact = run(double(model))
        actual = Engine(path, "linalg").run("main", [x for x in inputs.values() if isinstance(x, Tensor)])
        assert_all_within_budget(actual[:1], [exact], lambda: [run(model)])
