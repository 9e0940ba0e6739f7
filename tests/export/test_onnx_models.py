"""Real models with policies in onnxruntime, at other sizes than they were traced with, against attention rewritten by hand."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler.testing.budget import assert_all_within_budget
from end_to_end.models import double
from export.real_models import MODELS

LATER = [pytest.param(name, marks=pytest.mark.full) for name in MODELS if name != "bert"]


@pytest.mark.parametrize("name", ["bert", *LATER])
def test_a_model_with_a_policy_computes_in_onnxruntime_what_it_does_by_hand(name: str, tmp_path: Path) -> None:
    case, path = MODELS[name], tmp_path / f"{name}.onnx"
    model, traced = case.made(), case.inputs(2, 40)
    auto = {key: dict.fromkeys(range(x.ndim), torch.export.Dim.AUTO) for key, x in traced.items() if isinstance(x, Tensor)}
    shapes = {key: auto.get(key) for key in traced}
    report = attn.export_onnx(model, (), path, case.policy, kwargs=traced, dynamic_shapes=shapes)
    assert "approximate" in {decision.outcome for decision in report.report.decisions}
    session = onnxruntime.InferenceSession(path)
    for rows, length in ((2, 40), (3, 300)):
        inputs = case.inputs(rows, length)
        by_us = session.run(None, {name: x.numpy() for name, x in inputs.items() if isinstance(x, Tensor)})[0]
        run = case.rewritten(inputs)
        with torch.no_grad():
            exact = run(double(model))
            assert_all_within_budget([torch.from_numpy(by_us)], [exact], lambda run=run: [run(model)])
