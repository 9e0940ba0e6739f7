"""Models of the other families under masks that are hard to read: packed rows, a dense mask, groups of image tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zoo.entry import (
    BATCH,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    SDPA,
    TOKENS,
    VOCABULARY,
    WIDTH,
    Entry,
    Inputs,
    hugging_face,
    padding,
    tokens,
)
from zoo.text import BART, LLAMA, MISTRAL, T5


def with_inputs(
    name: str, entry: Entry, more: Callable[[str], Inputs], implementations: tuple[str, ...] = ("eager", "sdpa")
) -> Entry:
    """A model that is there already, with some inputs replaced."""

    def build(implementation: str) -> tuple[nn.Module, Inputs]:
        model, inputs = entry.build(implementation)
        return model, {**inputs, **more(implementation)}

    return Entry(name, build, entry.sites, implementations)


def two_documents(implementation: str) -> Inputs:
    positions = torch.cat([torch.arange(10), torch.arange(TOKENS - 10)])
    return {"position_ids": positions[None].expand(BATCH, -1).contiguous()}


def dense_mask(implementation: str) -> Inputs:
    visible = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(BATCH, 1, TOKENS, TOKENS).contiguous()
    return {"attention_mask": _additive(visible) if implementation == "eager" else visible}


def _additive(visible: Tensor) -> Tensor:
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)


def padded(implementation: str) -> Inputs:
    return {"attention_mask": padding(right=5)}


def text_with_an_image() -> Inputs:
    is_image = torch.zeros(BATCH, TOKENS, dtype=torch.long)
    is_image[:, 4:8] = 1
    return {"input_ids": tokens(), "token_type_ids": is_image, "attention_mask": padding()}


GEMMA3_IMAGE_GROUPS = hugging_face(
    "gemma3_mm_prefix",
    "Gemma3ForConditionalGeneration",
    "Gemma3Config",
    {
        "text_config": {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 96,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "max_position_embeddings": 64,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
    },
    text_with_an_image,
)

ENTRIES = (
    with_inputs("llama_packed", LLAMA, two_documents),
    with_inputs("mistral_packed", MISTRAL, two_documents),
    with_inputs("llama_4dmask", LLAMA, dense_mask),
    with_inputs("t5_pad", T5, padded),
    GEMMA3_IMAGE_GROUPS,
    with_inputs("bart_padded", BART, padded, SDPA),
)
