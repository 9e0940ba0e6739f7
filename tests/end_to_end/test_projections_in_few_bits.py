"""Projections in int8 of models that compute in sixteen bits, beside whole numbers and float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, fx, nn

import attn_compiler as attn
from attn_compiler.algebra.storage import Held, Numbers, Shared
from attn_compiler.graph.rounding import rounding
from attn_compiler.testing import assert_within_budget
from end_to_end.integers import product
from end_to_end.projected import Attention, inputs

POLICY = {"version": 1, "rules": [{"attn": {"storage": {"projections": "int8"}}}]}  # outliers are left in, so that it shows

INT8 = Held(Numbers("int8", 8, mantissa=7, smallest=7, largest=127), Shared("token"))

pytestmark = pytest.mark.usefixtures("quick")


class Whole(nn.Module):
    """A layer that multiplies whole numbers; what comes out is rounded to `dtype`, as between the layers of a model."""

    def __init__(self, layer: nn.Module, of: torch.dtype, dtype: torch.dtype) -> None:
        super().__init__()
        weight, bias = (layer.get_parameter(name).detach().to(of).double() for name in ("weight", "bias"))
        self.weight, self.bias, self.dtype = weight, bias, dtype

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.from_numpy(product(x.double().reshape(-1, 32).numpy(), self.weight.numpy(), math.inf))
        return (flat.reshape(x.shape) + self.bias).to(self.dtype)


def by_hand(model: nn.Module, x: Tensor, of: torch.dtype, dtype: torch.dtype) -> Tensor:
    """What the model gives whose weights and input are those of the type `of`, all that is between layers in `dtype`."""
    hand = copy.deepcopy(model)
    for name in "qkvo":
        setattr(hand, name, Whole(model.get_submodule(name), of, dtype))
    found: Tensor = hand(x.to(of))
    return found


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
def test_layers_are_rounded_as_they_are_computed(how: str, learning: bool) -> None:
    torch.manual_seed(0)
    model, x = Attention().train(learning), inputs().float()
    dtype = torch.float16 if how == "float16" else torch.bfloat16
    if how != "autocast":
        model, x = model.to(dtype), x.to(dtype)
    with torch.no_grad():
        exact, plain = (by_hand(model, x, x.dtype, between) for between in (torch.float64, dtype))
        with pytest.raises(AssertionError):
            assert_within_budget(copy.deepcopy(model).double()(x.double()), exact, plain, "without rounding")
    for _ in range(2):
        compiled = torch.compile(model, backend="attn", options={"policy": POLICY})
        with torch.set_grad_enabled(learning), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            found = compiled(x)
        [decision] = attn.reports()[-1].decisions
        assert decision.outcome == "approximate", attn.reports()[-1]
        assert found.dtype == dtype
        assert found.requires_grad == learning
        assert_within_budget(found.detach(), exact, plain, how)


def test_autocast_around_a_product_changes_nothing_in_it() -> None:
    graph, x, weight = fx.Graph(), inputs().float(), torch.randn(32, 32, generator=torch.Generator().manual_seed(2))
    nodes = [graph.placeholder(name) for name in ("x", "weight")]
    layer = graph.call_function(torch.ops.aten.linear.default, (*nodes,))
    for node, val in zip((*nodes, layer), (x, weight, x), strict=True):
        node.meta["val"] = val
    compute, given = rounding(layer, INT8)
    assert given == nodes
    alone = compute(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compute(x, weight), alone)


def test_a_break_of_the_graph_that_hides_a_layer_is_a_refusal() -> None:
    class Broken(Attention):
        def behind(self, out: Tensor, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().behind(out, x)

    torch.manual_seed(0)
    model, x = Broken().eval(), inputs().float()
    with torch.no_grad():
        found = torch.compile(model, backend="attn", options={"policy": POLICY})(x)
        torch.testing.assert_close(found, model(x))
    refusals = [refusal.reason for report in attn.reports() for one in report.decisions for refusal in one.refusals]
    assert any("its output leaves the graph before a product" in reason for reason in refusals)
