"""Vision models of transformers: patches, windows, pyramids, promptable masks, object queries."""

from __future__ import annotations

from collections.abc import Callable

import torch

from zoo.entry import BATCH, BOTH, EAGER, HEADS, LAYERS, WIDTH, Entry, Inputs, hugging_face

PATCHES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
WINDOWS = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}


def image(size: int = 32, batch: int = BATCH) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": torch.randn(batch, 3, size, size)}


def patches(name: str, family: str, **settings: object) -> Entry:
    return hugging_face(name, f"{family}Model", f"{family}Config", {**PATCHES, **settings}, image())


SAM = hugging_face(
    "sam",
    "SamModel",
    "SamConfig",
    {
        "vision_config": {
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "output_channels": 32,
            "image_size": 32,
            "patch_size": 4,
            "mlp_dim": 96,
            "window_size": 4,
            "global_attn_indexes": [1],
            "num_pos_feats": 16,
        },
        "prompt_encoder_config": {"hidden_size": 32, "image_size": 32, "patch_size": 4, "mask_input_channels": 4},
        "mask_decoder_config": {
            "hidden_size": 32,
            "mlp_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "attention_downsample_rate": 2,
            "iou_head_hidden_dim": 32,
        },
    },
    lambda: {**image(batch=1)(), "input_points": torch.rand(1, 1, 2, 2) * 31},
    sites=LAYERS + 2 * 3 + 1,  # the encoder; per decoder layer: tokens, tokens to image, image to tokens; a last one
)

DETR = hugging_face(
    "detr",
    "DetrForObjectDetection",
    "DetrConfig",
    {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": {
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "layer_type": "basic",
            "out_features": ["stage2"],
        },
        "num_queries": 10,
        "encoder_layers": LAYERS,
        "decoder_layers": LAYERS,
        "d_model": WIDTH,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "num_labels": 5,
    },
    image(64),
    sites=3 * LAYERS,
    implementations=EAGER,
)

SEGFORMER = hugging_face(
    "segformer",
    "SegformerForSemanticSegmentation",
    "SegformerConfig",
    {
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [16, 32, 32, 48],
        "num_attention_heads": [1, 2, 2, 4],
        "sr_ratios": [4, 2, 2, 1],
        "decoder_hidden_size": 32,
    },
    image(64),
    sites=4,
)

ENTRIES = (
    patches("vit", "ViT"),
    patches("deit", "DeiT"),
    patches("beit", "Beit", use_relative_position_bias=True),
    patches("dinov2", "Dinov2"),
    patches("dinov3_vit", "DINOv3ViT"),
    hugging_face("swin", "SwinModel", "SwinConfig", WINDOWS, image(), 4, BOTH),
    hugging_face("swinv2", "Swinv2Model", "Swinv2Config", WINDOWS, image(), 4, EAGER),
    SAM,
    DETR,
    SEGFORMER,
)
