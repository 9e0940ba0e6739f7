"""A small attention among its layers, and what a rule makes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import attn_compiler as attn
from end_to_end.integers import rounded

HELD = {"type": "int8", "outliers": 2.0}
SLOTS = {"storage": {"projections": HELD}}
POLICY = {"version": 1, "rules": [{"attn": SLOTS}]}
CLOSE = 2.0**-18  # a code times its scale is a float32


class Attention(nn.Module):
    """Four heads of 8; what a test changes stands in its subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)

    def behind(self, out: Tensor, x: Tensor) -> Tensor:
        return self.o(out)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one.unflatten(-1, (4, 8)).transpose(1, 2) for one in self.operands(x))
        return self.behind(sdpa(q, k, v).transpose(1, 2).flatten(2), x)


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval().double()


def inputs() -> Tensor:
    x = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[..., [3, 20]] *= 20
    return x


def by_hand(model: nn.Module, *names: str) -> nn.Module:
    model = copy.deepcopy(model)
    assert len(rounded(model, names, HELD["outliers"])) == len(names)
    return model


def off(found: Tensor, exact: Tensor) -> float:
    """How far a result is from the exact one, in parts of its size."""
    return float((found - exact).norm() / exact.norm())


@torch.no_grad()
def refusal(model: nn.Module, policy: object = POLICY) -> str:
    """Why nothing is rounded; the model computes what it did."""
    found = torch.compile(model, backend="attn", options={"policy": policy})(inputs())
    assert off(found, model(inputs())) < 1e-12
    decisions = attn.reports()[-1].decisions
    assert all(d.outcome == "refused" for d in decisions), attn.reports()[-1]
    return str(decisions[0].refusals[0].reason)
