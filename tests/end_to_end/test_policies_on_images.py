"""Policies on models of images: neighborhoods on the grid of patches, around tokens that stay global."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from end_to_end.by_hand import all_became, check, check_training, everywhere, policy, with_weights
from end_to_end.grids import SIDE, image, neighbors

quick = pytest.mark.usefixtures("quick")
VISION = {"image_size": 4 * SIDE, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def vit(implementation: str = "sdpa") -> nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(**VISION, intermediate_size=32, attn_implementation=implementation)
    return with_weights(ViTModel(config, add_pooling_layer=False))


def dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    return with_weights(Dinov2Model(Dinov2Config(**VISION, mlp_ratio=1, attn_implementation="sdpa")))


def dinov2_with_registers() -> nn.Module:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(**VISION, mlp_ratio=1, num_register_tokens=4, attn_implementation="sdpa")
    return with_weights(Dinov2WithRegistersModel(config))


def look(model: nn.Module) -> Tensor:
    pixels = torch.randn(2, 3, 4 * SIDE, 4 * SIDE, generator=torch.Generator().manual_seed(2))
    out = model(pixels.to(next(model.parameters()).dtype)).last_hidden_state
    assert isinstance(out, Tensor)
    return out


CLASS = policy("queries(cls) | keys(cls) | neighborhood([3, 3])", geometries=image(before=1), roles={"cls": "0:1"})
REGISTERS = policy("queries('0:5') | keys('0:5') | neighborhood(5)", geometries={"image": {"size": "square", "before": 5}})


@quick
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_patches_of_a_vit_see_their_neighbors_and_the_class_token_sees_all(implementation: str) -> None:
    report = check(vit(implementation), look, CLASS, everywhere(neighbors(3, before=1)))
    all_became(report, "approximate", ["layers.0.attention", "layers.1.attention"])


@quick
def test_a_vit_with_neighborhoods_trains() -> None:
    report = check_training(vit().train(), look, CLASS, everywhere(neighbors(3, before=1)))
    all_became(report, "approximate", ["layers.0.attention", "layers.1.attention"])


@quick
def test_a_square_is_inferred_and_the_registers_of_a_dinov2_stay_global() -> None:
    report = check(dinov2_with_registers(), look, REGISTERS, everywhere(neighbors(5, before=5)))
    all_became(report, "approximate", ["encoder.layer.0.attention", "encoder.layer.1.attention"])


def test_inductor_compiles_the_neighborhoods_of_a_dinov2() -> None:
    report = check(dinov2(), look, CLASS, everywhere(neighbors(3, before=1)))
    all_became(report, "approximate", ["encoder.layer.0.attention", "encoder.layer.1.attention"])
