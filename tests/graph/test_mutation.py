"""A tensor that is written in place is what was written last, and what it was before where that was copied."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.testing import assert_within_budget

LENGTH, DIM = 12, 8
Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]


def written_over(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * DIM**-0.5
    scores[:] = scores + torch.triu(torch.full(scores.shape[-2:], -1e9), 1)
    return scores.softmax(-1) @ v


def copied_before_it_is_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.clone()
    kept = torch.empty_like(k).copy_(k)
    k.mul_(3.0)
    return (q @ kept.mT * DIM**-0.5).softmax(-1) @ v


def copied_and_written_then(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kept = torch.empty_like(k).copy_(k)
    kept.mul_(3.0)
    return (q @ kept.mT * DIM**-0.5).softmax(-1) @ v


class Attention(nn.Module):
    def __init__(self, core: Spelling) -> None:
        super().__init__()
        self.core = core
        self.qkv = nn.Linear(DIM, 3 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.core(*self.qkv(x).chunk(3, dim=-1))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("core", [written_over, copied_before_it_is_written, copied_and_written_then])
def test_what_a_write_leaves_is_read(core: Spelling, dynamic: bool) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    model, x = Attention(core), torch.randn(2, LENGTH, DIM)
    before = len(attn.reports())
    with torch.no_grad():
        ours, plain = torch.compile(model, backend="attn", dynamic=dynamic)(x), model(x)
        exact = model.double()(x.double())
    assert_within_budget(ours, exact, plain)
    assert sum(len(report.sites) for report in attn.reports()[before:]) == 1
