"""However an attention is written, the matcher finds it, and its record alone is enough to compute it again."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from attn_compiler.graph.capture import capture
from attn_compiler.graph.match import Matches, match
from attn_compiler.graph.replay import Replay
from attn_compiler.testing import assert_all_within_budget

HEADS, KV_HEADS, DIM, LENGTH = 4, 2, 8, 12
WIDTH = HEADS * DIM
Core = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Spelling:
    core: Core
    layout: str = "bhsd"
    kv_heads: int = HEADS
    sites: int = 1


SPELLINGS: dict[str, Spelling] = {}


def spelling(layout: str = "bhsd", kv_heads: int = HEADS, sites: int = 1) -> Callable[[Core], Core]:
    def keep(core: Core) -> Core:
        SPELLINGS[core.__name__] = Spelling(core, layout, kv_heads, sites)
        return core

    return keep


class Attention(nn.Module):
    """Projections around a hand-written attention."""

    def __init__(self, written: Spelling) -> None:
        super().__init__()
        self.written = written
        self.qkv = nn.Linear(WIDTH, WIDTH + 2 * written.kv_heads * DIM)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        kv = self.written.kv_heads * DIM
        q, k, v = self.qkv(x).split([WIDTH, kv, kv], -1)
        q, k, v = (t.view(batch, length, -1, DIM) for t in (q, k, v))
        if self.written.layout == "bhsd":
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = self.written.core(q, k, v)
        if self.written.layout == "bhsd":
            y = y.transpose(1, 2)
        return self.out(y.reshape(batch, length, WIDTH))


def lower(n: int) -> Tensor:
    return torch.tril(torch.ones(n, n, dtype=torch.bool))


@spelling()
def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@spelling()
def sdpa_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@spelling(kv_heads=KV_HEADS)
def sdpa_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.3)


@spelling()
def sdpa_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=lower(q.shape[-2]))


@spelling()
def sdpa_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=-(i[:, None] - i).abs() * torch.rand(HEADS, 1, 1))


@spelling(kv_heads=KV_HEADS)
def repeated_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def repeat(x: Tensor) -> Tensor:
        return x[:, :, None].expand(-1, -1, HEADS // KV_HEADS, -1, -1).flatten(1, 2)

    return ((q @ repeat(k).transpose(2, 3)) * DIM**-0.5).softmax(-1, dtype=torch.float32).to(q.dtype) @ repeat(v)


@spelling(kv_heads=KV_HEADS)
def interleaved_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    return (q @ k.mT / DIM).softmax(-1) @ v


@spelling(kv_heads=KV_HEADS)
def tiled_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
    return (q @ k.mT / DIM).softmax(-1) @ v


@spelling(kv_heads=1)
def one_key_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


@spelling()
def einsum_bhsd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = torch.einsum("bhqd,bhkd->bhqk", q, k) * DIM**-0.5
    return torch.einsum("bhqk,bhkd->bhqd", a.softmax(-1), v)


@spelling("bshd")
def einsum_bshd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(DIM)
    a = a.masked_fill(~lower(q.shape[1]), -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", F.softmax(a, -1), v)


@spelling("bshd", KV_HEADS)
def einsum_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.unflatten(2, (KV_HEADS, HEADS // KV_HEADS))
    a = torch.einsum("bqgrd,bkgd->bgrqk", grouped, k) * DIM**-0.5
    return torch.einsum("bgrqk,bkgd->bqgrd", a.softmax(-1), v).flatten(2, 3)


@spelling()
def einsum_ellipsis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = torch.einsum("...id,...jd->...ij", q * DIM**-0.5, k)
    return torch.einsum("...ij,...jd->...id", torch.softmax(a, dim=-1), v)


@spelling()
def nano(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.size(-2)
    a = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    a = a.masked_fill(torch.tril(torch.ones(n, n)).view(1, 1, n, n) == 0, float("-inf"))
    return F.dropout(F.softmax(a, dim=-1), 0.0) @ v


@spelling()
def three_axes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    q, k, v = (t.reshape(batch * heads, length, dim) for t in (q, k, v))
    a = torch.bmm(q, k.transpose(1, 2)).mul_(dim**-0.5)
    return torch.bmm(F.softmax(a, dim=2), v).view(batch, heads, length, dim)


@spelling()
def product_with_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    q, k, v = (t.reshape(batch * heads, length, dim) for t in (q, k, v))
    bias = torch.triu(torch.full((length, length), float("-inf"), dtype=q.dtype), 1).expand(batch * heads, length, length)
    a = torch.baddbmm(bias, q, k.transpose(-1, -2), beta=1, alpha=dim**-0.5)
    return torch.bmm(a.softmax(-1), v).view(batch, heads, length, dim)


@spelling()
def four_then_three_axes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    q, k, v = (t.reshape(batch * heads, length, dim) for t in (q, k, v))
    a = torch.bmm(q, k.mT).view(batch, heads, length, length)
    a = a.masked_fill(~lower(length), torch.finfo(a.dtype).min).softmax(-1)
    return torch.bmm(a.view(batch * heads, length, length), v).view(batch, heads, length, dim)


@spelling()
def scale_on_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = DIM**-0.25
    i = torch.arange(q.shape[-2])
    a = torch.where(i[:, None] >= i[None, :], (q * s) @ (k * s).mT, -1e9)
    return torch.matmul(a.float().softmax(-1, dtype=torch.float32).type_as(v), v)


@spelling()
def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.matmul(k, q.transpose(-1, -2)) / DIM**0.5, dim=-2).transpose(-1, -2) @ v


@spelling()
def values_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (v.mT @ torch.softmax(q @ k.mT / DIM**0.5, -1).mT).mT


@spelling()
def exponential_early(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = q @ k.mT * DIM**-0.5
    p = (a - a.amax(-1, keepdim=True)).exp()
    return (p / p.sum(-1, keepdim=True)) @ v


@spelling()
def exponential_late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = q @ k.mT * DIM**-0.5
    p = torch.exp(a - a.max(dim=-1, keepdim=True).values)
    return (p @ v) / p.sum(-1, keepdim=True)


@spelling()
def exponential_of_log_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(q @ k.mT * DIM**-0.5, -1).exp() @ v


@spelling()
def multiplied_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b = lower(q.shape[-2]).float()
    return ((q @ k.mT / math.sqrt(DIM)) * b + -1e4 * (1 - b)).softmax(-1) @ v


@spelling()
def softcap_and_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2])
    distance = i[:, None] - i
    a = 20 * torch.tanh(q @ k.mT * DIM**-0.5 / 20)
    return a.masked_fill((distance < 0) | (distance > 6), torch.finfo(a.dtype).min).softmax(-1) @ v


@spelling()
def sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = q @ k.mT * DIM**-0.5
    return torch.cat([a, torch.ones_like(a[..., :1])], -1).softmax(-1)[..., :-1] @ v


@spelling()
def sink_in_front(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = torch.cat([torch.ones_like(q[..., :1]), q @ k.mT], -1)
    return (a - a.max(-1, keepdim=True).values).softmax(-1)[..., 1:] @ v


@spelling()
def cosine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * 10.0).clamp(max=5.0).softmax(-1) @ v


@spelling()
def head_temperature(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * torch.linspace(0.1, 1, HEADS).view(HEADS, 1, 1)).softmax(-1) @ v


@spelling()
def top_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = q @ k.mT * DIM**-0.5
    return a.masked_fill(a < a.topk(8, -1).values[..., -1:], float("-inf")).softmax(-1) @ v


@spelling()
def weights_set_to_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    visible = lower(q.shape[-2]).tril(-1)
    return (q @ k.mT * DIM**-0.5).masked_fill(~visible, -1e30).softmax(-1).masked_fill(~visible, 0.0) @ v


@spelling()
def weights_escape(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.mT * DIM**-0.5).softmax(-1)
    return p @ v + p.mean()


@spelling()
def fill_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = q @ k.mT * DIM**-0.5
    a.masked_fill_(~lower(a.shape[-1]), float("-inf"))
    return a.softmax(-1) @ v


@spelling()
def written_after_use(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, copy = q.clone(), v.clone()
    o = (q @ k.mT * DIM**-0.5).softmax(-1) @ copy
    q.zero_()
    copy.zero_()
    return o + q + copy


@spelling()
def keys_filled_by_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    filled = torch.empty_like(k)
    filled[..., :3], filled[..., 3:] = k[..., :3], k[..., 3:]
    return (q @ filled.mT).softmax(-1) @ v


@spelling(sites=0)
def talking_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mix = torch.eye(HEADS).to(q)
    a = torch.einsum("bhqk,hg->bgqk", q @ k.mT * DIM**-0.5, mix).softmax(-1)
    return torch.einsum("bhqk,hg->bgqk", a, mix) @ v


@spelling(sites=0)
def slots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


@spelling(sites=0)
def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


@spelling(sites=0)
def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(q @ k.mT) @ v


@spelling(sites=0)
def set_through_indexing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = q @ k.mT * DIM**-0.5
    a[:, :, :, 9:] = float("-inf")
    return a.softmax(-1) @ v


@spelling(sites=0)
def written_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = q @ k.mT * DIM**-0.5
    a.view(-1, a.shape[-2], a.shape[-1]).add_(torch.triu(torch.full(a.shape[-2:], -1e9), 1))
    return a.softmax(-1) @ v


@spelling(sites=0)
def written_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.clone()
    a = q @ k.mT * DIM**-0.5
    q.mul_(3.0)
    return a.softmax(-1) @ v + q


def matched(model: nn.Module, *args: Any, dynamic: bool | None = None, **kwargs: Any) -> tuple[list[Matches], Any]:
    """Compile `model` so that every site is computed from its record; return the matches and the output."""
    torch._dynamo.reset()
    seen: list[Matches] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        captured = capture(gm, example_inputs)
        seen.append(match(captured))
        return Replay(captured, seen[-1].sites).run

    return seen, torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)


def assert_as_close_as_its_own_precision(got: Tensor, model: nn.Module, x: Tensor) -> None:
    exact = copy.deepcopy(model).double()(x.double()).detach()
    assert_all_within_budget([got.detach()], [exact], lambda: [model(x).detach()])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_found_and_computed_again_from_its_record(name: str, dynamic: bool) -> None:
    torch.manual_seed(0)
    written = SPELLINGS[name]
    model, x = Attention(written), torch.randn(2, LENGTH, WIDTH)
    torch.manual_seed(1)
    (found,), out = matched(model, x, dynamic=dynamic)
    assert len(found.sites) == written.sites, found.near_misses
    for site in found.sites:
        assert math.prod(int(a.size) for a in site.heads) == HEADS
        assert math.prod(int(a.size) for a in site.kv_heads) in (written.kv_heads, HEADS)
    if "_bias" not in name and "weights_set" not in name:
        assert_as_close_as_its_own_precision(out, model, x)


@pytest.mark.parametrize("name", [name for name, written in SPELLINGS.items() if written.sites and name != "sdpa_bias"])
def test_gradients_flow_through_a_record(name: str) -> None:
    torch.manual_seed(0)
    model, x = Attention(SPELLINGS[name]), torch.randn(2, LENGTH, WIDTH)

    def gradient(one: nn.Module, out: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(out.square().sum(), [one.qkv.weight]))

    wide = copy.deepcopy(model).double()
    exact = gradient(wide, wide(x.double()))
    _, out = matched(model, x)
    assert_all_within_budget(gradient(model, out), exact, lambda: gradient(model, model(x)))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("slots", "sum over the axis of the softmax"),
        ("talking_heads", "the softmax does not run over an axis that only one factor"),
        ("written_between", "written between its use and the product with v"),
        ("written_through_a_view", "it is written through another view of its memory before the softmax reads it"),
        ("set_through_indexing", "it is written through another view of its memory before the softmax reads it"),
    ],
)
def test_a_near_miss_says_what_disagreed(name: str, reason: str) -> None:
    (found,), _ = matched(Attention(SPELLINGS[name]), torch.randn(2, LENGTH, WIDTH))
    assert any(reason in miss.reason for miss in found.near_misses), found.near_misses
