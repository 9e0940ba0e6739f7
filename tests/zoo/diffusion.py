"""Models of diffusers: a convolutional one, transformers for images and video, an autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from zoo.entry import BATCH, BOTH, HEAD_DIM, HEADS, LAYERS, SDPA, WIDTH, Entry, Inputs


def _use_plain_processors(model: nn.Module) -> None:
    from diffusers.models.attention_processor import Attention, AttnProcessor

    for part in model.modules():
        if isinstance(part, Attention):
            part.set_processor(AttnProcessor())


def diffusers_model(
    name: str,
    model_class: str,
    settings: Mapping[str, object],
    inputs: Callable[[], Inputs],
    sites: int = LAYERS,
    implementations: tuple[str, ...] = SDPA,
) -> Entry:
    def build(implementation: str) -> tuple[nn.Module, Inputs]:
        import diffusers

        model = getattr(diffusers, model_class)(**settings)
        if implementation == "eager":
            _use_plain_processors(model)
        return model.eval(), inputs()

    return Entry(name, build, sites, implementations)


IMAGE = {"in_channels": 4, "sample_size": 8, "patch_size": 2}
SHAPE = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "num_layers": LAYERS}


def latent(batch: int, *size: int) -> torch.Tensor:
    return torch.randn(batch, 4, *size)


def prompt(batch: int, width: int) -> torch.Tensor:
    return torch.randn(batch, 7, width)


ENTRIES = (
    diffusers_model(
        "unet2dcond",
        "UNet2DConditionModel",
        {
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": (16, 32),
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 24,
            "attention_head_dim": 4,
        },
        lambda: {
            "sample": latent(BATCH, 16, 16),
            "timestep": torch.tensor(3),
            "encoder_hidden_states": prompt(BATCH, 24),
        },
        sites=2 * (1 + 1 + 2),  # self and cross, in one block on the way down, one in the middle, two on the way up
        implementations=BOTH,
    ),
    diffusers_model(
        "dit",
        "DiTTransformer2DModel",
        {**IMAGE, **SHAPE, "out_channels": 4, "norm_num_groups": 4, "num_embeds_ada_norm": 10},
        lambda: {
            "hidden_states": latent(BATCH, 8, 8),
            "timestep": torch.tensor([3, 4]),
            "class_labels": torch.tensor([1, 2]),
        },
        implementations=BOTH,
    ),
    diffusers_model(
        "pixart",
        "PixArtTransformer2DModel",
        {
            **IMAGE,
            **SHAPE,
            "out_channels": 8,
            "cross_attention_dim": WIDTH,
            "norm_num_groups": 4,
            "caption_channels": 24,
            "use_additional_conditions": False,
        },
        lambda: {
            "hidden_states": latent(BATCH, 8, 8),
            "encoder_hidden_states": prompt(BATCH, 24),
            "timestep": torch.tensor([3, 4]),
            "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
        },
        sites=2 * LAYERS,
        implementations=BOTH,
    ),
    diffusers_model(
        "sd3",
        "SD3Transformer2DModel",
        {
            **IMAGE,
            **SHAPE,
            "joint_attention_dim": 24,
            "caption_projection_dim": WIDTH,
            "pooled_projection_dim": 24,
            "out_channels": 4,
            "pos_embed_max_size": 8,
        },
        lambda: {
            "hidden_states": latent(BATCH, 8, 8),
            "encoder_hidden_states": prompt(BATCH, 24),
            "pooled_projections": torch.randn(BATCH, 24),
            "timestep": torch.tensor([3.0, 4.0]),
        },
    ),
    diffusers_model(
        "flux",
        "FluxTransformer2DModel",
        {
            **SHAPE,
            "num_layers": 1,
            "num_single_layers": 1,
            "patch_size": 1,
            "in_channels": 4,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 24,
            "axes_dims_rope": (4, 4, 8),
        },
        lambda: {
            "hidden_states": torch.randn(1, 16, 4),
            "encoder_hidden_states": prompt(1, 24),
            "pooled_projections": torch.randn(1, 24),
            "timestep": torch.tensor([3.0]),
            "img_ids": torch.randn(16, 3),
            "txt_ids": torch.zeros(7, 3),
        },
    ),
    diffusers_model(
        "wan",
        "WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 32,
            "ffn_dim": 32,
            "num_layers": LAYERS,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32,
        },
        lambda: {
            "hidden_states": latent(1, 2, 8, 8),
            "timestep": torch.tensor([3]),
            "encoder_hidden_states": prompt(1, 16),
        },
        sites=2 * LAYERS,
    ),
    diffusers_model(
        "cogvideox",
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 16,
            "num_layers": LAYERS,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 9,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": 7,
        },
        lambda: {
            "hidden_states": torch.randn(1, 3, 4, 8, 8),
            "encoder_hidden_states": prompt(1, 16),
            "timestep": torch.tensor([3]),
        },
    ),
    diffusers_model(
        "hunyuan_video",
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": 1,
            "patch_size_t": 1,
            "guidance_embeds": True,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 4, 4),
        },
        lambda: {
            "hidden_states": latent(1, 1, 4, 4),
            "encoder_hidden_states": prompt(1, 16),
            "timestep": torch.tensor([3]),
            "encoder_attention_mask": torch.ones(1, 7),
            "pooled_projections": torch.randn(1, 8),
            "guidance": torch.tensor([6.0]),
        },
        sites=3,
    ),
    diffusers_model(
        "vae_attn",
        "AutoencoderKL",
        {
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "layers_per_block": 1,
        },
        lambda: {"sample": torch.randn(1, 3, 16, 16)},
        sites=2,
        implementations=BOTH,
    ),
)
