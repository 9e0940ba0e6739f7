"""Linear attention without scores: keys are summed up into states, chunk by chunk where the mask is causal."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Sort
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.site import UNKNOWN_LENGTH
from attn_compiler.targets.arrays import Arrays
from attn_compiler.targets.explicit import Sums, per_kv_head
from attn_compiler.targets.linear import Linear, linear
from attn_compiler.targets.operands import Operands
from attn_compiler.torch_private import likely

CHUNK = 64  # tokens that meet each other directly
MOST_CHUNKS = 128  # with a decay, every chunk meets the states of all before it


def chunks(operands: Operands, variant: Variant) -> Linear | None:
    """What makes a call of mapped operands linear, where gathering by states saves at least half of the work, else None."""
    found = linear(variant)
    if found is None or (variant.dropout and operands.training):
        return None
    if found.behind is not None and _offset(operands, found) is None:
        return None
    q_len, k_len = (likely(size, UNKNOWN_LENGTH) for size in (operands.q_len, operands.k_len))
    return found if pays(found, q_len, k_len, operands.q.shape[-1], operands.v.shape[-1]) else None


def pays(found: Linear, q_len: int, k_len: int, features: int, value_dim: int) -> bool:
    """Whether states save at least half of the multiplications."""
    near = 0 if found.behind is None else min(q_len, CHUNK)
    by_states = (q_len + k_len) * features * value_dim + q_len * near * (features + value_dim)
    return 2 * by_states <= q_len * k_len * (features + value_dim)


def gather_by_states(operands: Operands, variant: Variant, found: Linear, arrays: Arrays) -> Sums:
    """Gather as the written-out formula would, with [batch, heads, tokens, dim] operands of the dtype `arrays.real`."""
    q, k, v = operands.q * arrays.tensor(arrays.read(variant.scale), Sort.REAL), operands.k, operands.v
    v = torch.cat([v, v.new_ones((*v.shape[:-1], 1))], dim=-1)  # what gathers in the last column is the sum of weights
    exists = _exists(operands, found, arrays)
    if exists is not None:
        k, v = k * exists, v * exists
    counted = v if variant.normalizer.counts else v[..., -1:]
    if found.behind is None:
        acc, seen = per_kv_head(q, k.mT @ v), counted.sum(dim=-2, keepdim=True)
    else:
        offset = _offset(operands, found)
        assert offset is not None
        acc = _Chunks.of(operands, offset, found, arrays).gather(q, k, v)
        seen = _running(counted, offset, operands.q_len)
    seen = seen.repeat_interleave(q.shape[1] // seen.shape[1], dim=1)
    sees = (seen[..., -1:] > 0).expand(*acc.shape[:-1], 1)
    mass = torch.where(sees, acc[..., -1:], 1.0)
    sums = Sums(acc[..., :-1], mass, torch.zeros_like(mass), sees)
    if not variant.normalizer.counts:
        return sums
    return replace(sums, seen=torch.where(sees, seen[..., -1:], 1.0), values=seen[..., :-1])


def _offset(operands: Operands, found: Linear) -> int | None:
    """How far ahead of a query's own place in the call its latest visible key stands; None where nobody knows."""
    first_query, first_key = operands.first_query, operands.k_positions
    if not isinstance(first_query, int) or not isinstance(first_key, int) or found.behind is None:
        return None
    return first_query - first_key - found.behind


def _exists(operands: Operands, found: Linear, arrays: Arrays) -> Tensor | None:
    """1 for keys that exist, else 0, as [batch, kv heads, keys, 1]; None where all do."""
    if found.shown == e.true:
        return None
    shown = arrays.tensor(arrays.read(found.shown), Sort.BOOL).to(arrays.real)
    of_heads = shown.expand(operands.q.shape[0], operands.q.shape[1], 1, operands.k_len).mT
    return of_heads[:, :: operands.q.shape[1] // operands.k.shape[1]]


def _running(counted: Tensor, offset: int, q_len: int) -> Tensor:
    """The sums of what each query sees."""
    places = torch.arange(q_len, device=counted.device) + offset
    sums = counted.cumsum(dim=-2).index_select(-2, places.clamp(0, counted.shape[-2] - 1))
    return torch.where((places >= 0)[:, None], sums, 0.0)


@dataclass(frozen=True)
class _Chunks:
    """How tokens are cut: `count` chunks of `size` queries; query i sees keys up to i + `offset`.

    `at_q` and `at_k` are the running logs of a decay, [batch, heads, tokens], in float64: they grow with the length, and only
    their differences count. Each of these is between a token and one before it, so that nothing overflows.
    """

    size: int
    count: int
    offset: int
    at_q: Tensor | None = None
    at_k: Tensor | None = None

    @classmethod
    def of(cls, operands: Operands, offset: int, found: Linear, arrays: Arrays) -> _Chunks:
        q_len, size = operands.q_len, CHUNK
        if found.fades is None:
            return cls(size, (q_len + size - 1) // size, offset)
        size = max(size, 1 << (likely(q_len, UNKNOWN_LENGTH) // MOST_CHUNKS - 1).bit_length())
        exactly = replace(arrays, real=torch.float64)
        at_k = exactly.tensor(exactly.read(found.fades), Sort.REAL)
        at_q = exactly.tensor(exactly.read(found.fades.substitute({e.k: e.q})), Sort.REAL)
        lead = operands.q.shape[:2]
        at_q, at_k = at_q.expand(*lead, q_len, 1)[..., 0], at_k.expand(*lead, 1, operands.k_len)[:, :, 0]
        return cls(size, (q_len + size - 1) // size, offset, at_q, at_k)

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
        if self.at_q is None or self.at_k is None:
            near, states = of_q @ of_k.mT, of_k.mT @ of_v
            before = F.pad(states, (0, 0, 0, 0, 1, 0)).cumsum(dim=-3)[..., :-1, :, :]
        else:
            log_q = self._cut(self.at_q.index_select(2, at_query)[..., None], kv_heads)
            log_k = self._cut(self.at_k.index_select(2, at_key)[..., None], kv_heads)
            near = of_q @ of_k.mT * _fading(log_q, log_k.mT, q)
            start, end = log_q[..., :1, :], log_k[..., -1:, :]
            states = (of_k * _fading(end, log_k, q)).mT @ of_v
            between = _fading(start[..., 0], end[..., 0].mT, q).tril(-1)
            before = (between @ states.flatten(-2)).reshape(states.shape)
            of_q = of_q * _fading(log_q, start, q)
        acc = (near.tril() @ of_v + of_q @ before).flatten(1, 2).flatten(2, 3)[:, :, :q_len]
        return acc + self._prefix(q, k, v) if self.offset > 0 else acc

    def _prefix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What is gathered from the first keys, which every query sees."""
        k, v = k[:, :, : self.offset], v[:, :, : self.offset]
        if self.at_q is None or self.at_k is None:
            return per_kv_head(q, k.mT @ v)
        log_q, log_k = self.at_q[..., None], self.at_k[:, :, : self.offset, None]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        start = log_q[:, :, :1]
        return (q * _fading(log_q, start, q)) @ ((k * _fading(start, log_k, q)).mT @ v)

    def _cut(self, x: Tensor, kv_heads: int) -> Tensor:
        """[batch, heads, tokens, dim] as [batch, kv heads, heads of each, chunks, tokens of a chunk, dim]."""
        return x.reshape(x.shape[0], kv_heads, x.shape[1] // kv_heads, self.count, self.size, x.shape[-1])


def _fading(later: Tensor, earlier: Tensor, like: Tensor) -> Tensor:
    """What is left of something at a later time, in the precision of `like`."""
    return (later - earlier).to(like.dtype).clamp(max=0.0).exp()
