"""A tensor that is written in place is what was written last, and what it was before where that was copied."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import attn_compiler as attn
from attn_compiler.backend import attn_eagerly
from attn_compiler.testing import assert_within_budget
from end_to_end.test_generation import since

LENGTH, DIM = 12, 8
Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]


def written_over(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * DIM**-0.5
    scores[:] = scores + torch.triu(torch.full(scores.shape[-2:], -1e9), 1)
    return scores.softmax(-1) @ v


def copied_before_it_is_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.clone()
    kept = torch.empty_like(k).copy_(k)
    k.mul_(3.0)
    return (q @ kept.mT * DIM**-0.5).softmax(-1) @ v


def copied_and_written_then(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kept = torch.empty_like(k).copy_(k)
    kept.mul_(3.0)
    return (q @ kept.mT * DIM**-0.5).softmax(-1) @ v


def biased_by_what_is_written_then(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.linspace(0, 3, LENGTH).repeat(LENGTH, 1)
    scores = q @ k.mT * DIM**-0.5 + bias
    bias.zero_()
    return scores.softmax(-1) @ v + bias[:, :DIM]


def biased_by_what_an_alias_wrote(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.zeros(LENGTH, LENGTH)
    bias[:, 3:].add_(torch.linspace(0, 3, LENGTH)[3:])
    scores = q @ k.mT * DIM**-0.5 + bias
    bias.mul_(2.0)
    return scores.softmax(-1) @ v


def cloned_before_an_alias_is_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.linspace(0, 3, LENGTH).repeat(LENGTH, 1)
    saved = bias.clone()
    bias[:, 3:].add_(1.0)
    scores = q @ k.mT * DIM**-0.5 + bias
    bias.mul_(2.0)
    return scores.softmax(-1) @ v + saved[:, :DIM]


def cloned_and_the_clone_is_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.linspace(0, 3, LENGTH).repeat(LENGTH, 1)
    scaled = bias.clone()
    scores = q @ k.mT * DIM**-0.5 + bias
    scaled.mul_(3.0)
    bias.mul_(2.0)
    return scores.softmax(-1) @ v + scaled[:, :DIM]


class Attention(nn.Module):
    def __init__(self, core: Spelling) -> None:
        super().__init__()
        self.core = core
        self.qkv = nn.Linear(DIM, 3 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.core(*self.qkv(x).chunk(3, dim=-1))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "core",
    [
        written_over, copied_before_it_is_written, copied_and_written_then, biased_by_what_is_written_then,
        biased_by_what_an_alias_wrote, cloned_before_an_alias_is_written, cloned_and_the_clone_is_written,
    ],
)  # fmt: skip
def test_what_a_write_leaves_is_read(core: Spelling, dynamic: bool) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    model, x = Attention(core), torch.randn(2, LENGTH, DIM)
    before = attn.reports()
    with torch.no_grad():
        ours, plain = torch.compile(model, backend="attn", dynamic=dynamic)(x), model(x)
        exact = model.double()(x.double())
    assert_within_budget(ours, exact, plain)
    assert sum(len(report.sites) for report in since(before)) == 1


class OverTwoNames(nn.Module):
    """A bias that is written by another name of its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.register_buffer("bias", torch.linspace(0, 3, LENGTH).repeat(LENGTH, 1))
        self.row = self.bias[:]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = q @ k.mT * DIM**-0.5 + self.bias
        self.row.mul_(-3.0)
        return scores.softmax(-1) @ v


def test_inputs_that_share_memory_are_written_together() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    model, x = OverTwoNames(), torch.randn(2, LENGTH, DIM)
    bias = model.bias.clone()
    with torch.no_grad():
        plain = model(x)
        model.bias.copy_(bias)
        ours = torch.compile(model, backend="attn")(x)
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("attends", [True, False])
def test_what_is_written_in_a_checkpoint_stays_written(attends: bool) -> None:
    def inside(x: Tensor) -> Tensor:
        y = x * 2.0
        y.relu_()
        return x + y

    def run(x: Tensor) -> Tensor:
        made = checkpoint(inside, x, use_reentrant=False)
        assert isinstance(made, Tensor)
        return (made @ made.mT).softmax(-1) @ made if attends else made.softmax(-1)

    torch.compiler.reset()
    x = torch.randn(2, LENGTH, DIM, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.compile(run, backend="attn")(x), run(x))


WINDOW = {"version": 1, "rules": [{"attn": {"mask": "causal & window(5)"}}]}


def within(length: int) -> Tensor:
    """The mask that this policy means."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return (distance >= 0) & (distance < 5)


@pytest.mark.parametrize("written", ["whole", "in part"])
def test_a_function_of_flex_reads_what_was_written_last(written: str) -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = torch.linspace(0, 3, LENGTH).repeat(LENGTH, 1)
        (bias if written == "whole" else bias[:, 3:]).mul_(-1.0)
        out = flex_attention(q[:, None], k[:, None], v[:, None], lambda x, b, h, i, j: x + bias[i, j])
        assert isinstance(out, Tensor)
        bias.zero_()
        return out[:, 0]

    torch.manual_seed(0)
    torch.compiler.reset()
    model, x, before = Attention(core), torch.randn(2, LENGTH, DIM), attn.reports()
    with torch.no_grad():
        ours = torch.compile(model, backend=attn_eagerly, options={"policy": WINDOW})(x)
        q, k, v = model.qkv(x).chunk(3, dim=-1)
        sites = [site for report in since(before) for site in report.sites]
        if written == "in part":  # nobody knows what an alias left
            torch.testing.assert_close(ours, model(x))
            assert not sites
            return
    bias = torch.linspace(0, -3, LENGTH).repeat(LENGTH, 1).masked_fill(~within(LENGTH), -torch.inf)
    plain = scaled_dot_product_attention(q, k, v, bias)
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), bias.double())
    assert_within_budget(ours, exact, plain)
    assert len(sites) == 1


class Counting(nn.Module):
    """Counts its tokens in a tensor, once its mask has read it; the next block reads what was counted."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.inside = inside
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("keys", torch.zeros(1, 4 * LENGTH, DIM))
        self.register_buffer("values", torch.zeros(1, 4 * LENGTH, DIM))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        places = torch.arange(x.shape[1]) + self.count
        seen = torch.arange(self.keys.shape[1]) <= places[:, None]
        count = self.count.to("cpu")  # as caches do, which shares its memory
        if not self.inside:
            count.add_(x.shape[1])
        k, v = self.keys.index_copy_(1, places, k), self.values.index_copy_(1, places, v)
        scores = (q @ k.mT * DIM**-0.5).masked_fill(~seen, -torch.inf)
        if self.inside:
            count.add_(x.shape[1])
        return scores.softmax(-1) @ v


PIECES = [LENGTH, 1, 1, LENGTH, 1]


@pytest.mark.parametrize("inside", [False, True])
def test_a_counter_that_is_written_while_the_model_runs_is_read_as_it_was(inside: bool) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    model, x = Counting(inside), torch.randn(1, sum(PIECES), DIM)
    compiled, before = torch.compile(model, backend="attn", options={"policy": WINDOW}), attn.reports()
    with torch.no_grad():
        q, k, v = (part[:, None] for part in model.qkv(x).chunk(3, dim=-1))
        ours = torch.cat([compiled(piece) for piece in x.split(PIECES, dim=1)], dim=1)
    assert model.count == sum(PIECES)
    seen = within(x.shape[1])
    plain = scaled_dot_product_attention(q, k, v, seen)
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), seen)
    assert_within_budget(ours[:, None], exact, plain)
    assert {one.outcome for report in since(before) for one in report.decisions} == {"approximate"}
