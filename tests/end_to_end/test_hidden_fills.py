"""A mask that is known at run time only may hold huge numbers: gradients are right also in rows that see nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.algebra import expr as e
from attn_compiler.testing import assert_all_within_budget

LOWEST = torch.finfo(torch.float32).min
ASKED = {"version": 1, "rules": [{"match": {}, "attn": {"score": "score"}}]}
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * 0.25 + mask, dim=-1) @ v


def with_exponentials(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT * 0.25 + mask
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v


def ours(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    out = attn.attend(q, k, v, attn.Variant(scale=e.const(0.25)), bias=mask)
    assert isinstance(out, Tensor)
    return out


def fill() -> Tensor:
    """Hides the second half of the keys, and from one query all of them."""
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:], mask[:, :, 3] = LOWEST, LOWEST
    return mask


def results(attend: Attend, dtype: torch.dtype, mask: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, 2, 16, 8, generator=generator).to(dtype).requires_grad_() for _ in "qkv"]
    out = attend(*leaves, mask.to(dtype))
    weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def compiled(attend: Attend, policy: object = "exact") -> Attend:
    torch.compiler.reset()
    run: Attend = torch.compile(attend, backend="attn", options={"policy": policy})
    return run


def form() -> str:
    """How the only attention of the latest graph runs."""
    (decision,) = attn.reports()[-1].decisions
    return decision.form if decision.target else decision.site.form


@pytest.mark.parametrize(
    "make",
    [lambda: compiled(by_hand), lambda: compiled(with_exponentials), lambda: compiled(by_hand, ASKED), lambda: ours],
    ids=["softmax", "exponentials", "asked for by a rule", "attend"],
)
def test_gradients_of_rows_that_see_nothing_are_right(make: Callable[[], Attend]) -> None:
    exact = results(by_hand, torch.float64, fill())
    assert_all_within_budget(results(make(), torch.float32, fill()), exact, lambda: results(by_hand, torch.float32, fill()))


def test_where_gradients_are_wanted_such_a_mask_is_written_out() -> None:
    results(compiled(by_hand), torch.float32, fill())
    assert form() == "written out"


@pytest.mark.usefixtures("quick")
def test_without_gradients_the_fused_operator_takes_such_a_mask() -> None:
    q = torch.randn(1, 2, 16, 8)
    compiled(by_hand)(q, q, q, fill())
    assert form() == "scaled_dot_product_attention with a mask"


class Biased(nn.Module):
    """Its bias is learned: nobody trains it to be huge."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 2, 16, 16))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return by_hand(q, k, v, self.bias)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_a_learned_bias_stays_with_the_fused_operator(trained: bool) -> None:
    model = Biased().requires_grad_(trained)
    q, k, v = (torch.randn(1, 2, 16, 8, requires_grad=True) for _ in "qkv")
    torch.compile(model, backend="attn")(q, k, v).sum().backward()
    assert form() == "scaled_dot_product_attention with a mask"
