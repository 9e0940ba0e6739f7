"""The ready policy `quantvla`, beside attention written down with whole numbers, temperatures and balances."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler import library
from end_to_end.projected import CLOSE, Attention, inputs, made, off


def rounded(x: Tensor, dim: int = -1) -> Tensor:
    """Whole numbers up to 7 times what the largest along `dim` is worth."""
    single = x.float()
    scale = single.abs().amax(dim, keepdim=True) / 7
    return ((single / scale).round() * scale).double()


def by_hand(model: Attention, x: Tensor, temperature: Tensor, balance: Tensor) -> Tensor:
    def layer(x: Tensor, linear: torch.nn.Linear) -> Tensor:
        return rounded(x) @ rounded(linear.weight).T + linear.bias

    q, k, v = (layer(x, one).unflatten(-1, (4, 8)).transpose(1, 2) for one in (model.q, model.k, model.v))
    scores = rounded(q) @ rounded(k).mT * temperature[:, None, None] / math.sqrt(8)
    unscaled = torch.exp(scores - scores.amax(-1, keepdim=True))
    codes = (unscaled * 15).round() / 15  # nothing among weights is negative, and the largest is 1
    out = codes @ rounded(v, -2) / unscaled.sum(-1, keepdim=True) * balance[:, None, None]
    return layer(out.transpose(1, 2).flatten(2), model.o)


@torch.no_grad()
def test_quantvla_is_attention_of_whole_numbers_with_two_factors_for_each_head() -> None:
    model, x = made(Attention), inputs()
    adapted = attn.adapt(model, library.load_policy("quantvla"), (x,))
    ones = torch.ones(4, dtype=torch.float64)
    assert {name: one.tolist() for name, one in adapted.learned.items()} == {"temperature": [[1.0] * 4], "balance": [[1.0] * 4]}
    assert off(adapted(x), by_hand(model, x, ones, ones)) < CLOSE
    temperature, balance = torch.tensor([0.5, 0.9, 1.2, 2.0]).double(), torch.tensor([1.5, 0.8, 1.1, 0.25]).double()
    adapted.learned["temperature"].copy_(temperature[None])
    adapted.learned["balance"].copy_(balance[None])
    assert off(adapted(x), by_hand(model, x, temperature, balance)) < CLOSE
    assert off(by_hand(model, x, ones, ones), model(x)) > 0.02, "four bits show"
