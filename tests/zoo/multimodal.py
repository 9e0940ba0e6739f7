"""Models of transformers that join text with images, or read any kind of array."""

from __future__ import annotations

import torch

from zoo.entry import BATCH, CROSS_TOKENS, EAGER, HEADS, LAYERS, VOCABULARY, WIDTH, hugging_face, padded_tokens, tokens
from zoo.vision import PATCHES, image

CAPTION = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CAPTION_AND_IMAGE = {"text_config": CAPTION, "vision_config": PATCHES}

ENTRIES = (
    hugging_face(
        "clip",
        "CLIPModel",
        "CLIPConfig",
        {**CAPTION_AND_IMAGE, "projection_dim": 32},
        lambda: {**padded_tokens(), **image()()},
        sites=2 * LAYERS,
    ),
    hugging_face(
        "siglip",
        "SiglipModel",
        "SiglipConfig",
        CAPTION_AND_IMAGE,
        lambda: {"input_ids": tokens(), **image()()},
        sites=2 * LAYERS + 1,  # the last one pools the image
    ),
    hugging_face(
        "blip2_qformer",
        "Blip2QFormerModel",
        "Blip2QFormerConfig",
        {
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "intermediate_size": 96,
            "encoder_hidden_size": 48,
            "cross_attention_frequency": 2,
            "vocab_size": VOCABULARY,
        },
        lambda: {
            "query_embeds": torch.randn(BATCH, 7, WIDTH),
            "encoder_hidden_states": torch.randn(BATCH, CROSS_TOKENS, 48),
        },
        sites=3,
        implementations=EAGER,
    ),
    hugging_face(
        "perceiver",
        "PerceiverModel",
        "PerceiverConfig",
        {
            "num_latents": 10,
            "d_latents": 64,
            "d_model": 48,
            "num_blocks": 1,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
            "qk_channels": 64,
            "v_channels": 64,
        },
        lambda: {"inputs": torch.randn(BATCH, CROSS_TOKENS, 48)},
        sites=3,
        implementations=EAGER,
    ),
)
