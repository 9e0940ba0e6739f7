"""Attentions that are linear already are recognized in the spellings that models use, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_compiler.graph.already import REASON
from attn_compiler.graph.capture import capture
from attn_compiler.graph.match import Matches, match

Core = Callable[[Tensor, Tensor, Tensor], Tensor]
HEADS, DIM, TOKENS = 2, 8, 12


def coat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """CoaT's factorized attention."""
    return DIM**-0.5 * (q @ (k.softmax(dim=2).transpose(-1, -2) @ v))


def efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Efficient attention, as in vit-pytorch and linear-attention-transformer."""
    q, k = q.softmax(dim=-1) * DIM**-0.5, k.softmax(dim=-2)
    context = torch.einsum("bhnd,bhne->bhde", k, v)
    return torch.einsum("bhnd,bhde->bhne", q, context)


def efficient_vit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """EfficientViT's, channels first, its denominator one more row of v."""
    q, k, v = (x.transpose(-1, -2) for x in (q, k, v))
    q, k = F.relu(q), F.relu(k)
    out = F.pad(v, (0, 0, 0, 1), value=1.0) @ k.transpose(-1, -2) @ q
    return (out[:, :, :-1] / (out[:, :, -1:] + 1e-15)).transpose(-1, -2)


def elu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """That of Katharopoulos et al."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    total = torch.einsum("bhnd,bhd->bhn", q, k.sum(2))
    return torch.einsum("bhnd,bhde->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v)) / total[..., None]


def agents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two attentions, one after the other."""
    pooled = q[:, :, ::4]
    return (q @ pooled.mT).softmax(-1) @ ((pooled @ k.mT).softmax(-1) @ v)


def raw(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Three factors that nobody mapped."""
    return q @ (k.mT @ v)


def matches(core: Core) -> Matches:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            out: Tensor = self.out(core(q, k, v).transpose(1, 2).flatten(2))
            return out

    x = torch.randn(1, TOKENS, 16)
    captured: list[Matches] = []

    def look(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        captured.append(match(capture(gm, inputs)))
        return gm.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(Attention().eval(), backend=look)(x)
    (found,) = captured
    return found


@pytest.mark.parametrize("core", [coat, efficient, efficient_vit, elu])
def test_a_linear_attention_is_recognized_and_left_alone(core: Core) -> None:
    found = matches(core)
    assert not found.sites
    assert [(miss.anchor, miss.reason) for miss in found.near_misses] == [("linear attention", REASON)]


def test_attentions_in_a_row_are_attentions() -> None:
    found = matches(agents)
    assert len(found.sites) == 2
    assert not found.near_misses


def test_products_alone_are_no_attention() -> None:
    assert matches(raw) == Matches((), ())
