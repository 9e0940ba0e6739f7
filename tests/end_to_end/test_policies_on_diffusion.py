"""Policies on diffusion transformers: neighborhoods and disks on the image, while text sees and is seen by all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from end_to_end.by_hand import RULE, all_became, became, check, everywhere, policy, with_weights
from end_to_end.grids import SIDE, disk, image, neighbors, noise

pytestmark = pytest.mark.usefixtures("quick")


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return with_weights(DiTTransformer2DModel(
        in_channels=4, sample_size=2 * SIDE, patch_size=2, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        out_channels=4, norm_num_groups=4, num_embeds_ada_norm=10,
    ))  # fmt: skip


def test_patches_of_a_diffusion_transformer_see_their_neighbors() -> None:
    def denoise(model: nn.Module) -> Tensor:
        latent = noise(2, 4, 2 * SIDE, 2 * SIDE).to(next(model.parameters()).dtype)
        out = model(latent, timestep=torch.tensor([3, 4]), class_labels=torch.tensor([1, 2])).sample
        assert isinstance(out, Tensor)
        return out

    report = check(dit(), denoise, policy("neighborhood([3, 3])", geometries=image()), everywhere(neighbors(3)))
    all_became(report, "approximate", [f"transformer_blocks.{n}.attn1" for n in range(2)])


TEXT = 7  # tokens of the prompt


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return with_weights(SD3Transformer2DModel(
        in_channels=4, sample_size=2 * SIDE, patch_size=2, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=24, out_channels=4, pos_embed_max_size=SIDE,
    ))  # fmt: skip


def test_text_behind_the_image_of_sd3_sees_and_is_seen_by_all() -> None:
    def denoise(model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        latent, prompt, pooled = noise(2, 4, 2 * SIDE, 2 * SIDE).to(dtype), noise(2, TEXT, 24).to(dtype), noise(2, 24).to(dtype)
        out = model(latent, prompt, pooled, timestep=torch.tensor([3.0, 4.0])).sample
        assert isinstance(out, Tensor)
        return out

    text = f"{SIDE**2}:{SIDE**2 + TEXT}"
    rules = policy("queries(text) | keys(text) | neighborhood(3)", "joint", geometries=image(after=TEXT), roles={"text": text})
    report = check(sd3(), denoise, rules, everywhere(neighbors(3, after=TEXT)))
    all_became(report, "approximate", [f"transformer_blocks.{n}.attn" for n in range(2)], "joint")


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return with_weights(FluxTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1, patch_size=1, in_channels=4,
        joint_attention_dim=24, pooled_projection_dim=24, axes_dims_rope=(4, 4, 8),
    ))  # fmt: skip


def test_a_disk_on_the_image_of_flux_leaves_the_text_before_it_global() -> None:
    at = torch.arange(SIDE**2)
    places = torch.stack([torch.zeros_like(at), at // SIDE, at % SIDE], dim=-1).float()

    def denoise(model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        latent, prompt, pooled = noise(1, SIDE**2, 4).to(dtype), noise(1, TEXT, 24).to(dtype), noise(1, 24).to(dtype)
        out = model(
            latent, prompt, pooled, timestep=torch.tensor([3.0]), img_ids=places, txt_ids=torch.zeros(TEXT, 3)
        ).sample  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    roles = {"text": f"0:{TEXT}"}
    rules = policy("queries(text) | keys(text) | ball(3)", "joint", geometries=image(before=TEXT), roles=roles)
    report = check(flux(), denoise, rules, everywhere(disk(3, before=TEXT)))
    assert became(report) == [
        ("transformer_blocks.0.attn", "joint", "approximate", RULE),
        ("single_transformer_blocks.0.attn", "joint", "approximate", RULE),
    ]
