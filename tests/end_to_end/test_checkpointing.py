"""Attentions inside of checkpointed blocks: found, decided, rewritten, computed again in the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attn_compiler as attn
from end_to_end.models import WINDOW, assert_outcome, like_llama, llama, outcome, tokens

HOW = {"use_reentrant": False}


def checkpointed(implementation: str) -> nn.Module:
    model = llama(implementation).train()
    model.activation_checkpointing_enable(HOW)
    return model


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("policy", ["exact", WINDOW], ids=["exact", "window"])
def test_a_checkpointed_llama_trains(implementation: str, policy: object) -> None:
    model, ids = checkpointed(implementation), tokens()
    actual = outcome(torch.compile(model, backend="attn", options={"policy": policy}), like_llama(ids))
    decisions = attn.reports()[-1].decisions
    assert [d.site.name for d in decisions] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert all(d.target for d in decisions) or (implementation, policy) == ("sdpa", "exact")
    assert {d.site.phase.value for d in decisions} == {"train"}
    assert_outcome(actual, model, like_llama(ids, None if policy == "exact" else 8))


class Blocks(nn.Module):
    """Two blocks of written out attention, checkpointed by hand; the same tables reach both."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))

    def block(self, x: Tensor, layer: int) -> Tensor:
        q, k, v = self.qkv[layer](x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        return x + (torch.softmax(q @ k.mT * 8**-0.5, dim=-1) @ v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in range(2):
            x = checkpoint(self.block, x, layer, use_reentrant=False)
        return x


@pytest.mark.usefixtures("quick")
def test_a_table_reaches_a_checkpointed_block() -> None:
    policy = {"version": 1, "labels": {"document": {"given": "documents"}},
              "rules": [{"match": {}, "attn": {"mask": "same(document)"}}]}  # fmt: skip
    documents = torch.tensor([0] * 5 + [1] * 11)
    model, x = Blocks(), torch.randn(2, 16, 16)
    compiled = torch.compile(model, backend="attn", options={"policy": policy, "tables": {"documents": documents}})
    actual = outcome(compiled, lambda one: one(x))
    assert len(attn.reports()[-1].decisions) == 2
    assert all(d.target for d in attn.reports()[-1].decisions)

    def by_hand(one: nn.Module) -> Tensor:
        y = x.to(next(one.parameters()).dtype)
        return torch.cat([one(y[:, :5]), one(y[:, 5:])], dim=1)

    assert_outcome(actual, model, by_hand)


def test_inductor_compiles_checkpointed_blocks() -> None:
    model, ids = checkpointed("eager"), tokens(1, 16)
    actual = outcome(torch.compile(model, backend="attn", options={"policy": WINDOW}), like_llama(ids))
    assert all(d.target for d in attn.reports()[-1].decisions)
    assert_outcome(actual, model, like_llama(ids, 8))
