"""Autocast and regions without gradients, around a compiled model and inside of one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.testing import assert_all_within_budget, assert_within_budget
from end_to_end.models import WINDOW, double, like_llama, llama, outcome, tokens

SOFTCAP = {"version": 1, "rules": [{"match": {}, "attn": {"score": "softcap(score, 5)"}}]}

pytestmark = pytest.mark.usefixtures("quick")


def cast(run: object) -> object:
    def inside(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run(model)

    return inside


class Casting(nn.Module):
    """A model that casts by itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **kwargs: Tensor) -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(**kwargs)


def compare(compiled: nn.Module, model: nn.Module, run: object, policy: object) -> None:
    """Both in autocast: what rounds differs, so that the budget is that of the rewritten eager model."""
    by_hand = like_llama(tokens(), None if policy == "exact" else 8)
    actual, exact = outcome(compiled, run), outcome(double(model), by_hand)
    assert_all_within_budget(actual, exact, lambda: outcome(model, cast(by_hand)))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("policy", ["exact", WINDOW], ids=["exact", "window"])
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_autocast_keeps_its_meaning(implementation: str, policy: object, where: str) -> None:
    model = llama(implementation).train()
    run = like_llama(tokens())
    if where == "outside":
        compare(torch.compile(model, backend="attn", options={"policy": policy}), model, cast(run), policy)
    else:
        compare(torch.compile(Casting(model), backend="attn", options={"policy": policy}), model, run, policy)
    assert len(attn.reports()[-1].decisions) == 2
    assert policy == "exact" or all(d.target for d in attn.reports()[-1].decisions)


@pytest.mark.parametrize("policy", ["exact", WINDOW], ids=["exact", "window"])
def test_a_region_without_gradients_has_none(policy: object) -> None:
    class Half(nn.Module):
        """The first of two models is frozen."""

        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.free = llama(), llama(vocab_size=8)

        def forward(self, ids: Tensor) -> Tensor:
            with torch.no_grad():
                hidden = self.frozen(ids).last_hidden_state
            return self.free(inputs_embeds=hidden).last_hidden_state

    model = Half().train()
    compiled = torch.compile(model, backend="attn", options={"policy": policy})
    compiled(tokens()).sum().backward()
    assert [site.phase.value for site in attn.reports()[-1].sites] == ["prefill"] * 2 + ["train"] * 2
    assert all(p.grad is None for p in model.frozen.parameters())
    assert all(p.grad is not None for name, p in model.free.named_parameters() if "embed_tokens" not in name)


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
def test_inference_changes_no_gradient_mode(outer: object) -> None:
    model, ids = llama("eager").eval(), tokens()
    compiled = torch.compile(model, backend="attn", options={"policy": WINDOW})
    with outer():
        out = compiled(ids).last_hidden_state
    assert not out.requires_grad
    expected = like_llama(ids, 8)
    assert_within_budget(out, expected(double(model)).detach(), expected(model).detach())


@pytest.mark.parametrize("policy", ["exact", SOFTCAP], ids=["exact", "softcap"])
def test_the_result_has_the_type_that_autocast_gives_it(policy: object) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT / 4, dim=-1) @ v

    q, k, v = torch.randn(3, 1, 2, 16, 16)
    compiled = torch.compile(attend, backend="attn", options={"policy": policy})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(q, k, v).dtype is attend(q, k, v).dtype is torch.bfloat16
    assert attn.reports()[-1].decisions[0].target


class Plain(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


@torch.no_grad()
@pytest.mark.parametrize("held", ["int8", "nvfp4"])
def test_what_codes_stand_for_is_not_rounded_again(held: str) -> None:
    storage = {"storage": {"qk": held, "pv": held}}
    policy = {"version": 1, "rules": [{"match": {}, "attn": storage}]}
    q, k, v = (torch.randn(2, 4, 64, 32) for _ in range(3))
    compiled = torch.compile(Plain(), backend="attn", options={"policy": policy, "target": "torch"})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = compiled(q, k, v)
    assert found.dtype == torch.bfloat16
    exact = attn.reference(q, k, v, storage)
    assert (found - exact).abs().max() <= 2.0**-8 * exact.abs().max(), "the result is rounded, once"
