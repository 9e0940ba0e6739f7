"""Gathering where every feature fades by a gate of its own: chunks of tokens, and a state whose rows fade each by itself.

What is left is always of something at a later token than it came from, so that no exponential overflows, however fast gates
close: within a chunk, tokens meet those of the same few one by one, and all before these at their first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Sort
from attn_compiler.algebra.feature import component
from attn_compiler.algebra.variant import Variant
from attn_compiler.targets.arrays import Arrays
from attn_compiler.targets.explicit import Sums
from attn_compiler.targets.fading import fading, shown_of
from attn_compiler.targets.gathered import pays
from attn_compiler.targets.linear import NEAR, linear
from attn_compiler.targets.operands import Operands

_FEW = 8  # tokens that meet one by one


def gather_faded(operands: Operands, variant: Variant, arrays: Arrays) -> Sums | None:
    """The sums of a causal variant with gates, of mapped operands in `arrays.real`; None where scores are to be made."""
    found, first = linear(variant), operands.first_query
    dropped = variant.dropout and operands.training
    if found is None or found.behind != 0 or dropped or variant.normalizer.counts or not isinstance(operands.k_positions, int):
        return None
    q, k, v, q_len, k_len = operands.q, operands.k, operands.v, operands.q_len, operands.k_len
    if not (isinstance(first, int) and isinstance(q_len, int) and isinstance(k_len, int)):
        return None
    earlier = first - operands.k_positions
    if earlier < 0 or not pays(found, q_len, k_len, q.shape[-1], v.shape[-1]):
        return None
    tokens = earlier + q_len
    q = q * arrays.tensor(arrays.read(variant.scale), Sort.REAL)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    exists = shown_of(operands, found, arrays)
    shown = torch.ones_like(k[..., :1], dtype=torch.bool) if exists is None else exists[..., None]
    k, v = torch.where(shown, k, 0.0), torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    q = F.pad(q, (0, 0, earlier, 0))
    k, v, shown = (F.pad(x, (0, 0, 0, tokens - k_len)) for x in (k, v, shown))  # a pad of less than none cuts
    out = _by_chunks(q, k, torch.where(shown, v, 0.0), _logs(operands, variant, tokens))[:, :, earlier:]
    sees = shown.cumsum(dim=2)[:, :, earlier:] > 0
    mass = torch.where(sees, out[..., -1:], 1.0)
    return Sums(out[..., :-1], mass, torch.zeros_like(mass), sees)


def _logs(operands: Operands, variant: Variant, tokens: int) -> Tensor:
    """The running logs of so many tokens from the first key on, [batch, heads, tokens, features] in float64."""
    assert variant.gates is not None
    assert isinstance(operands.k_positions, int)
    device, features = operands.q.device, operands.q.shape[-1]
    at = {
        **operands.numbers(),
        **operands.head_coordinates(trailing=2),
        e.b: torch.arange(operands.q.shape[0], device=device)[:, None, None, None],
        e.k: torch.arange(tokens, device=device)[:, None] + operands.k_positions,
        component: torch.arange(features, device=device),
    }
    arrays = Arrays(at, operands.tables, torch.float64, device)
    return arrays.tensor(arrays.read(variant.gates), Sort.REAL).expand(*operands.q.shape[:2], tokens, features)


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
