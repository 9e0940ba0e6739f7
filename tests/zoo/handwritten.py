"""Ways in which people write one attention by hand, and writes in place that make some of them a trap."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import BATCH, HEAD_DIM, HEADS, KV_HEADS, TOKENS, TORCH, WIDTH, Entry, Inputs, Outcome

Core = Callable[[Tensor, Tensor, Tensor], Tensor]
SCALE = HEAD_DIM**-0.5


class Projected(nn.Module):
    """Projections around `core`, which sees q, k and v as [batch, heads, tokens, dim], or tokens before heads."""

    def __init__(self, core: Core, kv_heads: int, tokens_first: bool) -> None:
        super().__init__()
        self.core = core
        self.kv_heads = kv_heads
        self.tokens_first = tokens_first
        self.qkv = nn.Linear(WIDTH, WIDTH + 2 * kv_heads * HEAD_DIM)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        kv_width = self.kv_heads * HEAD_DIM
        parts = self.qkv(x).split([WIDTH, kv_width, kv_width], -1)
        q, k, v = (part.view(batch, length, -1, HEAD_DIM) for part in parts)
        if self.tokens_first:
            y = self.core(q, k, v)
        else:
            y = self.core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        return self.out(y.reshape(batch, length, WIDTH))


ENTRIES: list[Entry] = []


def spelling(
    *, sites: int = 1, kv_heads: int = HEADS, tokens_first: bool = False, outcome: Outcome = Outcome.FOUND
) -> Callable[[Core], Core]:
    """Make a model of the zoo, named like the function, around one spelling."""

    def enter(core: Core) -> Core:
        def build(implementation: str) -> tuple[nn.Module, Inputs]:
            model = Projected(core, kv_heads, tokens_first).eval()
            return model, {"x": torch.randn(BATCH, TOKENS, WIDTH)}

        ENTRIES.append(Entry(core.__name__, build, sites, TORCH, outcome))
        return core

    return enter


@spelling()
def F_sdpa_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: N802
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@spelling(kv_heads=KV_HEADS)
def F_sdpa_gqa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: N802
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@spelling()
def einsum_bhsd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


@spelling(tokens_first=True)
def einsum_bshd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(HEAD_DIM)
    visible = torch.tril(torch.ones(q.shape[1], k.shape[1], dtype=torch.bool))
    scores = scores.masked_fill(~visible, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", F.softmax(scores, -1), v)


@spelling(tokens_first=True, kv_heads=KV_HEADS)
def einsum_gqa_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, length = q.shape[:2]
    q = q.view(batch, length, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
    scores = torch.einsum("bqgrd,bkgd->bgrqk", q, k) * SCALE
    return torch.einsum("bgrqk,bkgd->bqgrd", scores.softmax(-1), v).reshape(batch, length, HEADS, HEAD_DIM)


@spelling()
def einsum_ellipsis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("...id,...jd->...ij", q * SCALE, k)
    return torch.einsum("...ij,...jd->...id", torch.softmax(scores, dim=-1), v)


@spelling()
def nanogpt(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.size(-2)
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    visible = torch.tril(torch.ones(length, length)).view(1, 1, length, length)
    scores = scores.masked_fill(visible == 0, float("-inf"))
    return F.dropout(F.softmax(scores, dim=-1), 0.0) @ v


@spelling()
def bmm3d(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    q, k, v = (x.reshape(batch * heads, length, dim) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(dim**-0.5)
    return torch.bmm(F.softmax(scores, dim=2), v).view(batch, heads, length, dim)


@spelling()
def baddbmm_alpha(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    q, k, v = (x.reshape(batch * heads, length, dim) for x in (q, k, v))
    bias = torch.triu(torch.full((length, length), float("-inf"), dtype=q.dtype), 1).expand(batch * heads, length, length)
    scores = torch.baddbmm(bias, q, k.transpose(-1, -2), beta=1, alpha=dim**-0.5)
    return torch.bmm(scores.softmax(-1), v).view(batch, heads, length, dim)


@spelling()
def scale_both_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale = HEAD_DIM**-0.25
    scores = (q * scale) @ (k * scale).mT
    place = torch.arange(q.shape[-2])
    scores = torch.where(place[:, None] >= place[None, :], scores, -1e9)
    return torch.matmul(scores.float().softmax(-1, dtype=torch.float32).type_as(v), v)


@spelling()
def kT_q_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: N802
    scores_kq = torch.matmul(k, q.transpose(-1, -2)) / HEAD_DIM**0.5
    weights_kq = torch.softmax(scores_kq, dim=-2)
    return torch.matmul(weights_kq.transpose(-1, -2), v)


@spelling()
def vT_pT(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: N802
    weights = torch.softmax(q @ k.mT / HEAD_DIM**0.5, -1)
    return (v.mT @ weights.mT).mT


@spelling()
def manual_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


@spelling()
def manual_softmax_late_norm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return (weights @ v) / weights.sum(-1, keepdim=True)


@spelling()
def logsoftmax_exp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(q @ k.mT * SCALE, -1).exp() @ v


@spelling()
def mul_mask_gpt1(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    visible = torch.tril(torch.ones(q.shape[-2], q.shape[-2], dtype=q.dtype))
    scores = q @ k.mT / math.sqrt(HEAD_DIM)
    return (scores * visible + -1e4 * (1 - visible)).softmax(-1) @ v


@spelling()
def softcap_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    place = torch.arange(q.shape[-2])
    distance = place[:, None] - place
    scores = 20 * torch.tanh(q @ k.mT * SCALE / 20)
    scores = scores.masked_fill((distance < 0) | (distance > 6), torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v


@spelling()
def sink_softmax1(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    scores = torch.cat([scores, torch.zeros_like(scores[..., :1])], -1)
    return scores.softmax(-1)[..., :-1] @ v


@spelling()
def qk_norm_cos(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return (q @ k.mT * 10.0).softmax(-1) @ v


@spelling()
def topk_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    threshold = scores.topk(8, -1).values[..., -1:]
    return scores.masked_fill(scores < threshold, float("-inf")).softmax(-1) @ v


@spelling(sites=0)  # heads are mixed before and after the softmax: no head computes an attention of its own
def talking_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mix = torch.eye(HEADS, dtype=q.dtype)
    weights = torch.einsum("bhqk,hg->bgqk", q @ k.mT * SCALE, mix).softmax(-1)
    return torch.einsum("bhqk,hg->bgqk", weights, mix) @ v


def _causal_score(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.where(q >= k, score, -float("inf"))


@spelling()
def flex_hop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, score_mod=_causal_score)


@spelling()
def post_mask_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    place = torch.arange(q.shape[-2])
    visible = place[:, None] > place  # the first row sees nothing
    weights = (q @ k.mT * SCALE).masked_fill(~visible, -1e30).softmax(-1).masked_fill(~visible, 0.0)
    return weights @ v


@spelling()
def returns_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * SCALE).softmax(-1)
    return weights @ v + weights.mean()


@spelling()
def inplace_masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    visible = torch.tril(torch.ones(scores.shape[-2:], dtype=torch.bool))
    scores.masked_fill_(~visible, float("-inf"))
    return scores.softmax(-1) @ v


@spelling(outcome=Outcome.REFUSED)
def inplace_setitem(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    scores[:, :, :, 20:] = float("-inf")
    return scores.softmax(-1) @ v


@spelling(outcome=Outcome.REFUSED)
def inplace_view_alias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    length = scores.shape[-1]
    alias = scores.view(-1, length, length)
    alias.add_(torch.triu(torch.full((length, length), -1e9), 1))
    return scores.softmax(-1) @ v


@spelling()
def inplace_after_use(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.clone()
    scores = q @ k.mT * SCALE
    v = v.clone()
    out = scores.softmax(-1) @ v
    q.zero_()
    v.zero_()
    return out + q + v


@spelling(outcome=Outcome.REFUSED)
def q_mutated_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.clone()
    scores = q @ k.mT * SCALE
    q.mul_(3.0)
    return scores.softmax(-1) @ v + q
