"""Gathering where every feature fades by a gate of its own: chunks of tokens, and a state whose rows fade each by itself.

What is left is always of something at a later token than it came from, so that no exponential overflows, however fast gates
close: within a chunk, tokens meet those of the same few one by one, and all before these at their first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_compiler.targets.fading import Logs, fading, left_of
from attn_compiler.targets.gathered import Count, Gather
from attn_compiler.targets.linear import NEAR

_FEW = 8  # tokens that meet one by one


def _gathered(q: Tensor, k: Tensor, v: Tensor, logs: Logs | None, offset: Count | None) -> tuple[Tensor, Tensor]:
    assert logs is not None
    assert offset is not None
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    v = torch.cat([v, v.new_ones((*v.shape[:-1], 1))], dim=-1)  # what gathers in the last column is the sum of weights
    counted = all(isinstance(n, int) for n in (q.shape[2], k.shape[2], offset))
    out = _from_places(q, k, v, logs, int(offset)) if counted and q.shape[2] > _FEW else _by_scores(q, k, v, logs, offset)
    return out[..., :-1], out[..., -1:]


BY_FEATURE = Gather(_gathered, dynamic=False, counted=True, gates=True)


def _by_scores(q: Tensor, k: Tensor, v: Tensor, logs: Logs, offset: Count) -> Tensor:
    left = fading(logs[0][:, :, :, None], logs[1][:, :, None], q)
    latest: Tensor = torch.arange(q.shape[2], device=q.device).add(offset)
    seen = torch.arange(k.shape[2], device=q.device) <= latest[:, None]
    return torch.where(seen, (q[:, :, :, None] * k[:, :, None] * left).sum(dim=-1), 0.0) @ v


def _from_places(q: Tensor, k: Tensor, v: Tensor, logs: Logs, offset: int) -> Tensor:
    """What queries gather that stand where the latest key stands which they see, and are faded since then."""
    tokens = q.shape[2] + offset
    if tokens <= 0 or not k.shape[2]:
        return q.new_zeros((*q.shape[:-1], v.shape[-1]))
    rest = tokens - k.shape[2]  # a pad of less than none cuts
    k, v = (F.pad(x, (0, 0, 0, rest)) for x in (k, v))
    log = torch.cat([logs[1], logs[1][:, :, -1:].expand(-1, -1, max(rest, 0), -1)], dim=2)[:, :, :tokens]
    q, now = (F.pad(x, (0, 0, offset, 0)) for x in (q, logs[0]))
    out = _by_chunks(q * left_of(now, log, q), k, v, log)[:, :, max(offset, 0) :]
    return F.pad(out, (0, 0, max(-offset, 0), 0))


def _by_chunks(q: Tensor, k: Tensor, v: Tensor, log: Tensor) -> Tensor:
    """What each token gathers of itself and of those before it."""
    tokens = q.shape[2]
    count = -(-tokens // NEAR)
    rest = count * NEAR - tokens
    log = torch.cat([log, log[:, :, -1:].expand(-1, -1, rest, -1)], dim=2)
    q, k, v = (F.pad(x, (0, 0, 0, rest)) for x in (q, k, v))
    q, k, v, log = (x.reshape(*x.shape[:2], count, NEAR, x.shape[-1]) for x in (q, k, v, log))
    end = log[:, :, :, -1:]
    before = torch.cat([log[:, :, :1, :1], end[:, :, :-1]], dim=2)
    near, added = _near(q, k, log) @ v, (k * fading(end, log, k)).mT @ v
    reached, left = q * fading(log, before, q), fading(end, before, q).mT
    state, parts = added.new_zeros(added[:, :, 0].shape), []
    for n in range(count):
        parts.append(near[:, :, n] + reached[:, :, n] @ state)
        state = state * left[:, :, n] + added[:, :, n]
    return torch.cat(parts, dim=2)[:, :, :tokens]


def _near(q: Tensor, k: Tensor, log: Tensor) -> Tensor:
    """The weights within chunks, below the diagonal and on it."""
    rows = []
    for begin in range(0, NEAR, _FEW):
        own = slice(begin, begin + _FEW)
        of_q, of_k, now, first = q[..., own, :], k[..., own, :], log[..., own, :], log[..., begin : begin + 1, :]
        earlier = (of_q * fading(now, first, q)) @ (k[..., :begin, :] * fading(first, log[..., :begin, :], q)).mT
        left = fading(now[..., :, None, :], now[..., None, :, :], q)
        pairs = (of_q[..., :, None, :] * of_k[..., None, :, :] * left).sum(dim=-1).tril()
        rows.append(F.pad(torch.cat([earlier, pairs], dim=-1), (0, NEAR - begin - _FEW)))
    return torch.cat(rows, dim=-2)
