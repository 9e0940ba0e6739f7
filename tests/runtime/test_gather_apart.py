"""States whose rows or columns fade each by itself: the operator's gradients are runs of itself, and those of these are, too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attn_compiler.runtime import gather
from attn_compiler.runtime.states import Call
from attn_compiler.targets.fading import Fading

QUERIES, KEYS = 4, 6


def by_definition(told: Call) -> None:
    """What the kernels compute, in the precision of the operands."""
    assert told.logs is not None
    heads = told.out.shape[1]
    q, k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (told.q, told.k, told.v))
    at = torch.arange(q.shape[2])[:, None] + told.offset
    key = torch.arange(k.shape[2])
    seen = (key >= at if told.reverse else key <= at)[..., None]
    now, before = (x.reshape(*x.shape[:3], -1) for x in told.logs)
    apart = (now[:, :, :, None] - before[:, :, None]) * (-1 if told.reverse else 1)
    left = torch.where(seen, apart, -torch.inf).clamp(max=0.0).exp().to(q.dtype)  # [batch, heads, queries, keys, apart]
    if told.logs[0].ndim == Fading.COLUMNS:
        told.out.copy_((torch.einsum("bhqd,bhkd->bhqk", q, k)[..., None] * left * v[:, :, None]).sum(dim=3))
        return
    weights = torch.einsum("bhqd,bhkd,bhqkd->bhqk", q, k, left.expand(*left.shape[:-1], q.shape[-1]))
    told.out.copy_(weights @ v)
    assert told.mass is not None
    told.mass.copy_(weights.sum(dim=-1).flip(-1) if told.reverse else weights.sum(dim=-1))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("offset", [2, -1])
@pytest.mark.parametrize("apart", ["together", "rows", "columns"])
def test_gradients_are_runs_of_the_operator(apart: str, offset: int, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "run", by_definition)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator, dtype=torch.float64)

    leaves = [x.requires_grad_() for x in (drawn(2, QUERIES, 3), drawn(1, KEYS, 3), drawn(2, KEYS, 4))]
    width = {"together": (), "rows": (3,), "columns": (1, 4)}[apart]
    log, first = drawn(2, QUERIES + KEYS, *width).abs().cumsum(2).neg(), max(-offset, 0)
    later = first + offset + 1  # so no query stands at the very time of a key, where what is left has a corner
    logs = [log[:, :, later : later + QUERIES], log[:, :, first : first + KEYS]]
    logs = [(-x.flip(2) if reverse else x).clone().requires_grad_() for x in logs]
    offset = KEYS - QUERIES - offset if reverse else offset

    def run(*given: Tensor) -> Tensor:
        return torch.ops.attn_compiler.gather(*given[:3], list(given[3:]), offset, reverse, gather.CPP)[0]  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(run, (*leaves, *logs), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (*leaves, *logs), fast_mode=True)
