"""Small Hugging Face models, computed again from the records of their attentions, give what they gave."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import fx

from attn_compiler.graph.capture import capture
from attn_compiler.graph.match import Matches, match
from attn_compiler.graph.replay import Replay
from attn_compiler.testing import assert_all_within_budget

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
IDS = torch.arange(28).view(2, 14) + 3
PADDED = {"input_ids": IDS, "attention_mask": (torch.arange(14) < torch.tensor([[14], [11]])).long()}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "Llama": (
        "LlamaModel",
        {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "use_cache": False},
        {"input_ids": IDS},
        2,
    ),
    "Bert": ("BertModel", {**SMALL, "intermediate_size": 48}, PADDED, 2),
    "Bloom": ("BloomModel", {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4, "use_cache": False}, PADDED, 2),
    "Swin": (
        "SwinModel",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4},
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)},
        2,
    ),
}
RUNS = [(name, way) for name in MODELS for way in ("eager", "sdpa") if (name, way) != ("Bloom", "sdpa")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("name", "way"), RUNS)
def test_a_model_is_computed_again_from_its_records(name: str, way: str) -> None:
    torch._dynamo.reset()
    kind, config, inputs, sites = MODELS[name]
    made = getattr(transformers, f"{name}Config")(**config)
    model = getattr(transformers, kind)._from_config(made, attn_implementation=way).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # what is initialized to zero would hide an error
            parameter.add_(0.1 * torch.randn_like(parameter))
    seen: list[Matches] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        captured = capture(gm, example_inputs)
        seen.append(match(captured))
        return Replay(captured, seen[-1].sites).run

    with torch.no_grad():
        got = torch.compile(model, backend=backend)(**inputs)[0]
        exact = copy.deepcopy(model).double()(**{key: x.double() if x.is_floating_point() else x for key, x in inputs.items()})[0]
    assert sum(len(one.sites) for one in seen) == sites
    valid = inputs["attention_mask"].bool() if "attention_mask" in inputs else slice(None)
    with torch.no_grad():
        assert_all_within_budget([got[valid]], [exact[valid]], lambda: [model(**inputs)[0][valid]])
