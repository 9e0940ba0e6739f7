"""`storage: {kv_cache: {type: int8, per: channel}}`, or int4, in a file that decodes: its caches hold codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import attn_compiler as attn
from attn_compiler.errors import ExportError, RefusedError
from attn_compiler.export import Decoder
from attn_compiler.planning.measured import Cost
from end_to_end.by_hand import with_weights
from end_to_end.models import tokens


def held(kind: str) -> dict[str, object]:
    return {"kv_cache": {"type": kind, "per": "channel"}}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, max_position_embeddings=512))


def policy(**attention: object) -> dict[str, object]:
    return {"version": 1, "rules": [{"match": {}, "attn": {"storage": held("int8"), **attention}, "fallback": "error"}]}


def written(path: Path, asked: object, rows: int = 2) -> tuple[nn.Module, attn.ExportReport, Decoder]:
    model = with_weights(llama())
    report = attn.export_onnx(model, (tokens(rows, 60),), path / "model.onnx", asked, decode=True)  # type: ignore[arg-type]
    return model, report, Decoder(path / "model.onnx")


@pytest.mark.parametrize(("kind", "dtype", "width"), [("int8", "INT8", 8), ("int4", "UINT8", 4)])
@pytest.mark.parametrize(("mask", "holds"), [("causal", "every token"), ("causal & window(8)", "the latest 7 tokens")])
def test_a_cache_in_codes_is_right_to_what_they_say(
    mask: str, holds: str, kind: str, dtype: str, width: int, tmp_path: Path
) -> None:
    _, report, _ = written(tmp_path, policy(mask=mask, storage=held(kind)))
    assert len(report.checks) == 3, "a prompt, a token and a piece of text, beside the rewritten model with the same codes"
    assert set(report.caches.values()) == {f"{holds}, in {kind}"}
    assert set(report.strategies.values()) == {"contrib"}
    graph = onnx.load(tmp_path / "model.onnx").graph
    caches = [x.type.tensor_type for x in (*graph.input, *graph.output) if "key" in x.name or "value" in x.name]
    assert {x.elem_type for x in caches} == {onnx.TensorProto.DataType.Value(dtype)}
    assert {x.shape.dim[3].dim_value for x in caches} == {width}


@pytest.mark.parametrize(("kind", "most", "width"), [("int8", 0.05, 8), ("int4", 0.5, 4)])
def test_rounding_the_cache_changes_little_and_the_report_says_how_much(
    kind: str, most: float, width: int, tmp_path: Path
) -> None:
    model, report, decoder = written(tmp_path, policy(storage=held(kind)))
    text = tokens(2, 60)
    logits, past = decoder.step(text[:, :20].numpy(), 0, decoder.start(2))
    logits, past = decoder.step(text[:, 20:].numpy(), 20, past)
    with torch.no_grad():
        exact = model(text, use_cache=False).logits[:, -1].numpy()
    assert most / 100 < np.linalg.norm(logits - exact) / np.linalg.norm(exact) < most
    assert [x.shape() for x in past.values()] == [[2, 2, 60, width]] * 4
    with pytest.raises(ExportError, match="rows are of one length"):
        decoder.step(text[:, :2].numpy(), 60, past, np.r_[[[0] + [1] * 61], [[1] * 62]])
    assert str(report).count(f"holds its cache in {kind}, whose scales are those of the example") == 2


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (policy(mask="causal & (window(8) | sinks(2))"), "under a causal mask, with a window or none"),
        (policy(score="softcap(score, 30)"), "a softmax of scaled products, and nothing else"),
        (policy(storage={"kv_cache": "int8"}), "type: int8, per: channel"),
        (policy(storage=held("fp8_e4m3")), "type: int8, per: channel"),
    ],
    ids=["sinks", "softcap", "token", "fp8"],
)
def test_what_onnxruntime_does_not_hold_in_codes_is_refused(asked: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=says):
        written(tmp_path, asked)
    assert not list(tmp_path.iterdir())


def test_only_a_file_that_decodes_has_a_cache(tmp_path: Path) -> None:
    model, path = llama().eval(), tmp_path / "one.onnx"
    model.config.use_cache = False
    with pytest.raises(RefusedError, match="storage"):
        attn.export_onnx(model, (tokens(1, 24),), path, policy())
    with pytest.raises(RefusedError, match="storage"):
        attn.export_onnx(model, (tokens(1, 24),), path, policy(), decode=True, flavor="genai")


def test_a_file_whose_fixed_scales_cost_more_than_a_rule_promises_is_not_written(tmp_path: Path) -> None:
    model, text = with_weights(llama()), tokens(2, 60)
    for most in (0.5, 1e-6):
        asked = policy()
        asked["rules"][0]["tolerance"] = {"site": most}  # type: ignore[index]
        of_sites = attn.calibrate(model, asked, [{"input_ids": text, "use_cache": False}])
        assert of_sites.measured is not None
        kept = {name: replace(one, whole=Cost(0.0, 1.0, 0.0)) for name, one in of_sites.measured.sites.items()}
        measured = of_sites.without_measurements().with_measurements(replace(of_sites.measured, sites=kept))
        if most == 0.5:
            attn.export_onnx(model, (text,), tmp_path / "model.onnx", measured, decode=True, check=False)
            continue
        with pytest.raises(ExportError, match=r"scales are those of the example, its result differs by .*, beyond its `tol"):
            attn.export_onnx(model, (text,), tmp_path / "other.onnx", measured, decode=True, check=False)
    assert [x.name for x in tmp_path.glob("*.onnx")] == ["model.onnx"]
