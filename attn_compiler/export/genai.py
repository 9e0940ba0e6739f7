"""What onnxruntime-genai wants to know of a file that decodes: its `genai_config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attn_compiler.export.stepwise import Stepwise

NAME = "genai_config.json"


def genai_config(model: Any, step: Stepwise, path: Path) -> str:
    """The configuration that stands beside a file. Past and present are tensors of their own, as long as the text."""
    config = model.config.get_text_config(decoder=True)
    keys = step.args[step.before]
    tokens = {name: _token(getattr(config, name, None)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": path.name,
        "head_size": keys.shape[3],
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": keys.shape[1],
        "num_hidden_layers": len(step.args[step.before :]) // 2,
        "inputs": {
            "input_ids": "input_ids",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
    }
    described = {
        "type": "decoder",
        "vocab_size": step.vocabulary,
        "context_length": step.positions,
        **{name: token for name, token in tokens.items() if token is not None},
        "decoder": decoder,
    }
    search = {"do_sample": False, "num_beams": 1, "max_length": step.positions, "past_present_share_buffer": False}
    return json.dumps({"model": described, "search": search}, indent=2) + "\n"


def _token(found: object) -> object:
    """One of them, where a model has several."""
    return found[0] if isinstance(found, list) else found
