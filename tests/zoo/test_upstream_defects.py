"""What others get wrong, we get right; what a model gets wrong, we reproduce as it is written."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attn_compiler as attn
from attn_compiler.algebra.evaluate import evaluate_scalar
from attn_compiler.algebra.expr import const, h, k, score
from attn_compiler.testing import assert_all_within_budget
from zoo.catalogue import ZOO
from zoo.finding import find
from zoo.rebuilding import rebuild

RELEASE = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).div(4.0).softmax(dim=-2) @ v


def over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).mul(0.25).softmax(dim=1) @ v


def with_dropout_that_is_off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.dropout((q @ k.mT).div(4.0).softmax(dim=-2), 0.1, training=False) @ v


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).div(4.0)
    weights = (scores - scores.amax(-2, keepdim=True)).exp()
    return (weights / weights.sum(-2, keepdim=True)) @ v


def recomputed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = checkpoint(over_queries, q, k, v, use_reentrant=False)
    assert isinstance(out, Tensor)
    return out


def after_an_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    out = (q @ k.mT).div(4.0).masked_fill(~seen, -torch.inf).softmax(dim=-1) @ v
    return over_queries(out, k, v)


def results(attend: Attend, dtype: torch.dtype, grad: bool) -> list[Tensor]:
    """The output, and in training the gradients."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, 4, 32, 16, generator=generator).to(dtype).requires_grad_(grad) for _ in "qkv"]
    out = attend(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)
    return [out.detach(), *(torch.autograd.grad((out * weights).sum(), leaves) if grad else ())]


@pytest.fixture
def fresh() -> None:
    """Forget what was compiled before."""
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    "attend", [over_queries, over_heads, with_dropout_that_is_off, written_out, recomputed, after_an_attention]
)
def test_a_softmax_over_another_axis_is_computed_over_that_axis(attend: Attend, training: bool) -> None:
    actual = results(torch.compile(attend, backend="attn"), torch.float32, training)
    exact = results(attend, torch.float64, training)
    assert_all_within_budget(actual, exact, lambda: results(attend, torch.float32, training))


@pytest.mark.skipif(RELEASE >= (2, 14), reason="2.15 does not fuse it; when no release does, graph/sideways.py can go")
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("attend", [over_queries, over_heads, written_out])
def test_inductor_alone_takes_it_for_one_over_the_last_axis(attend: Attend) -> None:
    (actual,), (exact,) = results(torch.compile(attend), torch.float32, False), results(attend, torch.float64, False)
    assert (actual - exact).abs().max() > 0.1


def test_a_softmax_over_the_queries_is_no_attention_and_is_reported() -> None:
    matches = find(*ZOO["neg_bilinear_softmax_wrongdim"].make("torch"))
    assert matches.sites == ()
    assert [miss.anchor for miss in matches.near_misses] == ["softmax"]


def test_a_softmax_that_leads_to_no_product_is_left_as_it_is() -> None:
    compiled = torch.compile(lambda x: x.softmax(dim=1), backend="attn")
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(compiled(x), x.softmax(dim=1))
    (miss,) = attn.reports()[-1].near_misses
    assert miss.reason.startswith("no product of two tensors leads to the softmax")


def test_a_bias_that_a_model_adds_twice_is_added_twice() -> None:
    """Falcon's eager attention adds its ALiBi to a mask that holds it already; with SDPA it adds it once."""
    biases = []
    for implementation in ("eager", "sdpa"):
        model, inputs = ZOO["falcon_alibi"].make(implementation)
        site = attn.explain(model, kwargs=inputs).sites[0]
        biases.append(site.computes.score.substitute({score: const(0.0)}))
    for head, key in itertools.product(range(4), range(1, 24)):
        twice, once = (evaluate_scalar(bias, {h: head, k: key}) for bias in biases)
        assert twice == 2 * once > 0


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_a_model_that_adds_its_bias_twice_is_computed_again_as_it_is_written(train: bool) -> None:
    found = rebuild(*ZOO["falcon_alibi"].make("eager"), train=train)
    assert found.exact == ZOO["falcon_alibi"].found, found.reason
