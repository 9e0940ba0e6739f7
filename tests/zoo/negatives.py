"""Softmaxes and contractions that are no attention: finding one here is a false positive."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import BATCH, HEAD_DIM, HEADS, TOKENS, TORCH, VOCABULARY, WIDTH, Entry, Inputs


class Parts(nn.Module):
    """Parameters and modules by name, and a function of them and x."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


ENTRIES: list[Entry] = []


def negative(**parts: Callable[[], nn.Module | Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a model of the zoo, named like the function, that holds no attention."""

    def enter(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def build(implementation: str) -> tuple[nn.Module, Inputs]:
            model = Parts(forward, **{name: make() for name, make in parts.items()})
            return model, {"x": torch.randn(BATCH, TOKENS, WIDTH)}

        ENTRIES.append(Entry(f"neg_{forward.__name__}", build, 0, TORCH))
        return forward

    return enter


def linear(width: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(WIDTH, width)


def heads_of(projected: Tensor) -> list[Tensor]:
    return [part.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for part in projected.chunk(3, -1)]


@negative(gate=linear(4), experts=lambda: torch.randn(4, WIDTH, WIDTH))
def moe_router(parts: Parts, x: Tensor) -> Tensor:
    weights = parts.gate(x).softmax(-1)
    answers = torch.einsum("bse,nef->bsnf", x, parts.experts)
    return torch.einsum("bsn,bsnf->bsf", weights, answers)


@negative(gate=linear(1))
def attn_pool(parts: Parts, x: Tensor) -> Tensor:
    return (parts.gate(x).softmax(1) * x).sum(1)


@negative(gate=linear(4))
def attn_pool_mm(parts: Parts, x: Tensor) -> Tensor:
    return parts.gate(x).transpose(1, 2).softmax(-1) @ x


@negative(qkv=linear(3 * WIDTH))
def linear_attn(parts: Parts, x: Tensor) -> Tensor:
    q, k, v = heads_of(parts.qkv(x))
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


@negative(embedding=lambda: nn.Embedding(VOCABULARY, WIDTH))
def lm_head_softmax(parts: Parts, x: Tensor) -> Tensor:
    """A soft choice of embeddings: one head whose keys and values are parameters."""
    return (x @ parts.embedding.weight.T).softmax(-1) @ parts.embedding.weight


@negative(head=linear(VOCABULARY))
def ce_loss(parts: Parts, x: Tensor) -> Tensor:
    return F.cross_entropy(parts.head(x).flatten(0, 1), torch.zeros(x.shape[0] * x.shape[1], dtype=torch.long))


@negative(squeeze=linear(8), excite=lambda: nn.Linear(8, WIDTH))
def se_gate(parts: Parts, x: Tensor) -> Tensor:
    return x * parts.excite(parts.squeeze(x).relu()).softmax(-1)


@negative(qkv=linear(3 * WIDTH))
def sigmoid_attn(parts: Parts, x: Tensor) -> Tensor:
    q, k, v = heads_of(parts.qkv(x))
    return torch.sigmoid(q @ k.mT) @ v


@negative(qkv=linear(3 * WIDTH))
def bilinear_softmax_wrongdim(parts: Parts, x: Tensor) -> Tensor:
    """Normalized over queries (slot attention): Inductor's own matcher takes this for an attention."""
    q, k, v = heads_of(parts.qkv(x))
    return (q @ k.mT).softmax(-2) @ v
