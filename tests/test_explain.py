"""`attn.explain`: the plan of a model as it would be compiled, without compiling it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn


class Block(nn.Module):
    """Projections and one attention, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return torch.softmax(q @ k.mT * 8**-0.5, dim=-1) @ v


def phase(model: nn.Module, training: bool | None = None) -> str:
    return attn.explain(model, (torch.randn(1, 32, 16),), training=training).sites[0].phase.value


def test_the_phase_is_that_of_inference_unless_the_model_is_in_training() -> None:
    assert phase(Block().eval()) == "prefill"
    assert phase(Block().train()) == "train"


def test_the_phase_may_be_asked_for() -> None:
    assert phase(Block().eval(), training=True) == "train"
    assert phase(Block().train(), training=False) == "prefill"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_under_autocast_the_precision_is_that_of_the_products(implementation: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if implementation == "sdpa":
            return nn.functional.scaled_dot_product_attention(q, k, v)
        return torch.softmax(q @ k.mT * 8**-0.5, dim=-1) @ v

    operands = tuple(torch.randn(3, 1, 2, 16, 8))
    assert attn.explain(attend, operands).sites[0].dtype == "float32"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attn.explain(attend, operands).sites[0].dtype == "bfloat16"
