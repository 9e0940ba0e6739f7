"""Sites whose sizes are formulas of symbols are computed again in the layout that their model gave them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from attn_compiler.graph.analysis import analyze, carry_out
from attn_compiler.planning.plan import Decision, NearMiss, Plan
from attn_compiler.planning.site import Site
from attn_compiler.testing.budget import assert_all_within_budget

HEADS, WIDTH = 1, 16  # a single head has no axis of its own, so that the result is reshaped
kernel = torch.randn(HEADS * WIDTH, 3, 4, 4)


def pixels(image: Tensor) -> Tensor:
    """Attention of the patches of an image to its patches: their number is the square of a quotient."""
    patches = F.conv2d(image, kernel.to(image.dtype), stride=4).flatten(2)
    x = patches.unflatten(1, (HEADS, WIDTH)).mT
    return ((x @ x.mT).softmax(-1) @ x).transpose(1, 2).flatten(2)


def rewritten(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
    def exactly(sites: Sequence[Site], near_misses: Sequence[NearMiss]) -> Plan:
        assert len(sites) == 1
        return Plan(tuple(Decision(one, "all", one.computes, exact=True, target="torch") for one in sites), tuple(near_misses))

    analysis = analyze(gm, examples, exactly)
    carry_out(analysis, {}, {})
    return analysis.graph


def test_a_length_that_is_a_formula_is_read_off_a_tensor() -> None:
    torch.compiler.reset()
    compiled = torch.compile(pixels, backend=rewritten, dynamic=True)
    for size in (16, 24):
        image = torch.randn(2, 3, size, size)
        assert_all_within_budget([compiled(image)], [pixels(image.double())], lambda image=image: [pixels(image)])
