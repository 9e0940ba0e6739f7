"""Training with dropout in generated kernels: both passes drop the same, also where blocks are computed again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attn_compiler as attn
from attn_compiler.testing import assert_within_budget

LENGTH = 48


class Block(nn.Module):
    """An attention with dropout, written out or not, checkpointed or not."""

    def __init__(self, *, fused: bool, again: bool) -> None:
        super().__init__()
        self.fused, self.again = fused, again

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rate = 0.25 if self.training else 0.0
        if self.fused:
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)
        scores = (q @ k.mT).masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -torch.inf)
        return nn.functional.dropout(torch.softmax(scores, dim=-1), rate) @ v

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.again:
            return checkpoint(self.attend, q, k, v, use_reentrant=False)  # type: ignore[no-any-return]
        return self.attend(q, k, v)


@pytest.mark.parametrize("fused", [True, False], ids=["sdpa", "written out"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_gradients_belong_to_the_weights_that_were_kept(*, fused: bool, again: bool) -> None:
    """Values are the identity: the output is the weights, and the gradient of v their product with what comes from above."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, 3, LENGTH, 8, requires_grad=True) for _ in range(2))
    v, above = torch.eye(LENGTH).expand(2, 3, -1, -1).clone().requires_grad_(), torch.randn(2, 3, LENGTH, LENGTH)
    compiled = torch.compile(Block(fused=fused, again=again).train(), backend="attn")

    def step(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        weights = compiled(q, k, v)
        return weights.detach(), torch.autograd.grad(weights, v, above)[0]

    weights, gradient = step(1)
    assert [d.target for d in attn.reports()[-1].decisions] == ["cpp"], str(attn.reports()[-1])
    assert_within_budget(gradient, weights.double().mT @ above.double(), weights.mT @ above)
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    share = (weights == 0)[..., seen].double().mean().item()
    assert abs(share - 0.25) < 6 * (0.25 * 0.75 / (6 * int(seen.sum()))) ** 0.5
    assert torch.equal(weights, step(1)[0])
    assert not torch.equal(weights, step(2)[0])
