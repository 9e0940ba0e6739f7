"""Gathering by states in PyTorch's own operators: keys are summed up chunk by chunk where the mask is causal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_compiler.planning.site import UNKNOWN_LENGTH
from attn_compiler.targets.fading import Logs, fading
from attn_compiler.targets.gathered import Count, Gather
from attn_compiler.targets.linear import NEAR
from attn_compiler.targets.products import per_kv_head
from attn_compiler.torch_private import likely

MOST_CHUNKS = 128  # with a decay, every chunk meets the states of all before it


def _by_chunks(q: Tensor, k: Tensor, v: Tensor, logs: Logs | None, offset: Count | None) -> tuple[Tensor, Tensor]:
    v = torch.cat([v, v.new_ones((*v.shape[:-1], 1))], dim=-1)  # what gathers in the last column is the sum of weights
    if offset is None:
        acc = per_kv_head(q, k.mT @ v)
    else:
        assert isinstance(offset, int)
        acc = _Chunks.of(q.shape[2], offset, logs).gather(q, k, v)
    return acc[..., :-1], acc[..., -1:]


def _by_scores(q: Tensor, k: Tensor, v: Tensor, logs: Logs | None, offset: Count | None) -> tuple[Tensor, Tensor]:
    scores = per_kv_head(q, k.mT)
    if logs:
        scores = scores * fading(logs[0][..., None], logs[1][..., None, :], q)
    if offset is not None:
        latest: Tensor = torch.arange(q.shape[2], device=q.device).add(offset)
        scores = torch.where(torch.arange(k.shape[2], device=q.device) <= latest[:, None], scores, 0.0)
    return per_kv_head(scores, v), scores.sum(dim=-1, keepdim=True)


BY_CHUNKS = Gather(_by_chunks, dynamic=False)
BY_SCORES = Gather(_by_scores, dynamic=True)  # for few tokens, whose past is a state


@dataclass(frozen=True)
class _Chunks:
    """How tokens are cut: `count` chunks of `size` queries; query i sees keys up to i + `offset`.

    Each difference of logs is between a token and one before it, so that nothing overflows.
    """

    size: int
    count: int
    offset: int
    logs: Logs | None

    @classmethod
    def of(cls, q_len: int, offset: int, logs: Logs | None) -> _Chunks:
        size = NEAR
        if logs:
            size = max(size, 1 << (likely(q_len, UNKNOWN_LENGTH) // MOST_CHUNKS - 1).bit_length())
        return cls(size, (q_len + size - 1) // size, offset, logs)

    def gather(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The sums of weight * v, [batch, heads, queries, value dim]."""
        q_len, kv_heads = q.shape[2], k.shape[1]
        places = torch.arange(self.count * self.size, device=q.device)
        at_key, at_query = places + self.offset, places.clamp(max=q_len - 1)
        real = ((at_key >= 0) & (at_key < k.shape[2]))[:, None]
        at_key = at_key.clamp(0, k.shape[2] - 1)
        of_q = self._cut(q.index_select(2, at_query), kv_heads)
        of_k, of_v = (self._cut(x.index_select(2, at_key), kv_heads) for x in (k, v))
        of_k = of_k * real.reshape(self.count, self.size, 1)
        if self.logs is None:
            near, states = of_q @ of_k.mT, of_k.mT @ of_v
            before = F.pad(states, (0, 0, 0, 0, 1, 0)).cumsum(dim=-3)[..., :-1, :, :]
        else:
            log_q = self._cut(self.logs[0].index_select(2, at_query)[..., None], kv_heads)
            log_k = self._cut(self.logs[1].index_select(2, at_key)[..., None], kv_heads)
            near = of_q @ of_k.mT * fading(log_q, log_k.mT, q)
            start, end = log_q[..., :1, :], log_k[..., -1:, :]
            states = (of_k * fading(end, log_k, q)).mT @ of_v
            between = fading(start[..., 0], end[..., 0].mT, q).tril(-1)
            before = (between @ states.flatten(-2)).reshape(states.shape)
            of_q = of_q * fading(log_q, start, q)
        acc = (near.tril() @ of_v + of_q @ before).flatten(1, 2).flatten(2, 3)[:, :, :q_len]
        return acc + self._prefix(q, k, v) if self.offset > 0 else acc

    def _prefix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What is gathered from the first keys, which every query sees."""
        k, v = k[:, :, : self.offset], v[:, :, : self.offset]
        if self.logs is None:
            return per_kv_head(q, k.mT @ v)
        log_q, log_k = self.logs[0][..., None], self.logs[1][:, :, : self.offset, None]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        start = log_q[:, :, :1]
        return (q * fading(log_q, start, q)) @ ((k * fading(start, log_k, q)).mT @ v)

    def _cut(self, x: Tensor, kv_heads: int) -> Tensor:
        """[batch, heads, tokens, dim] as [batch, kv heads, heads of each, chunks, tokens of a chunk, dim]."""
        return x.reshape(x.shape[0], kv_heads, x.shape[1] // kv_heads, self.count, self.size, x.shape[-1])
