"""Policies on models that Dynamo sees in parts: broken between layers, or with bodies of operators that choose at run time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.testing import assert_within_budget
from end_to_end.models import WINDOW, double, like_llama, llama, near, tokens

pytestmark = pytest.mark.usefixtures("quick")


class _Breaks(nn.Module):
    """A layer's own MLP, after a call that no graph holds."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        out = self.mlp(x)
        assert isinstance(out, Tensor)
        return out


def broken(implementation: str) -> nn.Module:
    """A model of four layers that breaks within the second."""
    model = llama(implementation, num_hidden_layers=4).eval()
    model.layers[1].mlp = _Breaks(model.layers[1].mlp)
    return model


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_rule_reaches_every_layer_of_a_broken_model(implementation: str) -> None:
    model, ids = broken(implementation), tokens()
    by_hand = like_llama(ids, 8)
    with torch.no_grad():
        out = like_llama(ids)(torch.compile(model, backend="attn", options={"policy": WINDOW}))
        assert_within_budget(out, by_hand(double(model)), by_hand(model))
    decisions = [decision for report in attn.reports() for decision in report.decisions]
    assert len(decisions) == 3  # every layer is a graph of its own then, and one serves two of them
    assert all(decision.target for decision in decisions)


def test_a_rule_that_speaks_of_layers_is_refused_where_each_is_a_graph_of_its_own() -> None:
    policy = {"version": 1, "rules": [{"match": {"kind": "self", "layers": "-1"}, "attn": {"mask": "window(8)"}}]}
    model, ids = broken("eager"), tokens()
    with torch.no_grad():
        torch.compile(model, backend="attn", options={"policy": policy})(ids)
    decisions = [decision for report in attn.reports() for decision in report.decisions]
    assert not any(decision.target for decision in decisions)
    assert all("nobody knows its layer" in decision.refusals[0].reason for decision in decisions)


def attend(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.transpose(-1, -2).contiguous(), -1) @ x


class Choosing(nn.Module):
    """One attention that always runs, and one in a branch that data chooses."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.softmax(x @ x.mT, -1) @ x
        return torch.cond(
            x.sum() > 0, lambda x: torch.softmax(x @ x.transpose(-1, -2).contiguous(), -1) @ x, lambda x: x.sin(), (x,)
        )


def test_an_attention_in_a_branch_is_refused_with_the_reason_and_the_one_outside_is_rewritten() -> None:
    compiled = torch.compile(Choosing(), backend="attn", options={"policy": WINDOW})

    def by_hand(x: Tensor) -> Tensor:
        hidden = torch.zeros(20, 20, dtype=x.dtype).masked_fill(~near(20, 8), -torch.inf)
        x = torch.softmax(x @ x.mT + hidden, -1) @ x
        return torch.softmax(x @ x.mT, -1) @ x if x.sum() > 0 else x.sin()

    for sign in (1, -1):
        x = sign * torch.rand(2, 4, 20, 8, generator=torch.Generator().manual_seed(0))
        assert_within_budget(compiled(x), by_hand(x.double()), by_hand(x), f"branch {sign}")
    outside, inside = attn.reports()[-1].decisions
    assert outside.target
    assert not inside.target
    assert "inside of `cond`" in inside.refusals[0].reason


def test_attentions_in_loops_are_reported_and_left_alone() -> None:
    from torch._higher_order_ops.map import map as mapped
    from torch._higher_order_ops.while_loop import while_loop

    def each_row(x: Tensor) -> Tensor:
        return mapped(attend, x)

    def three_times(x: Tensor) -> Tensor:
        return while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, attend(x)), (torch.tensor(0), x))[1]

    x = torch.rand(3, 4, 20, 8, generator=torch.Generator().manual_seed(0))
    for run, operator, rows in ((each_row, "map_impl", 4), (three_times, "while_loop", 12)):
        out = torch.compile(run, backend="attn", options={"policy": WINDOW})(x)
        torch.testing.assert_close(out, run(x))
        [decision] = attn.reports()[-1].decisions
        assert math.prod((decision.site.batch, decision.site.heads)) == rows
        assert f"inside of `{operator}`" in decision.refusals[0].reason
