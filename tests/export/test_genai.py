"""`export_onnx(…, decode=True, flavor="genai")`: onnxruntime-genai's own generator, against torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import attn_compiler as attn
from attn_compiler.errors import ExportError
from end_to_end.by_hand import with_weights
from end_to_end.models import tokens

WINDOW, NEW = 6, 20


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    return MistralForCausalLM(MistralConfig(**sizes, num_hidden_layers=2, max_position_embeddings=512, sliding_window=WINDOW))


def test_its_generator_writes_what_torch_writes_and_sees_the_window(tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    model, prompt = with_weights(mistral()), tokens(1, 30)
    report = attn.export_onnx(model, (prompt,), tmp_path / "model.onnx", decode=True, flavor="genai")
    assert set(report.strategies.values()) == {"scan"}, "a token should not meet every key of the cache"
    params = og.GeneratorParams(loaded := og.Model(str(tmp_path)))
    params.set_search_options(max_length=30 + NEW, do_sample=False)
    generator = og.Generator(loaded, params)
    generator.append_tokens(prompt[0].numpy().astype("int32"))
    for _ in range(NEW):
        generator.generate_next_token()
    with torch.no_grad():
        text = model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        model.config.sliding_window = None
        unseen = model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert list(generator.get_sequence(0)) == text[0].tolist() != unseen[0].tolist()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["genai_config.json", "model.onnx"]
    assert json.loads((tmp_path / "genai_config.json").read_text())["model"]["decoder"]["num_key_value_heads"] == 2


def test_names_for_genai_need_a_model_that_decodes(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="decode=True"):
        attn.export_onnx(mistral().eval(), (tokens(1, 8),), tmp_path / "model.onnx", flavor="genai")
    with pytest.raises(ExportError, match='did you mean "genai"'):
        attn.export_onnx(mistral().eval(), (tokens(1, 8),), tmp_path / "model.onnx", decode=True, flavor="gena")  # type: ignore[arg-type]
