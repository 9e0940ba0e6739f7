"""Linear attention without scores: where keys may be added up before a query meets them, and what queries gather then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_compiler.algebra.expr import Sort
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.site import UNKNOWN_LENGTH
from attn_compiler.targets.arrays import Arrays
from attn_compiler.targets.explicit import Sums
from attn_compiler.targets.fading import Logs, logs_of, shown_of
from attn_compiler.targets.linear import NEAR, Linear, linear
from attn_compiler.targets.operands import Operands
from attn_compiler.targets.past import Earlier, earlier, with_past
from attn_compiler.torch_private import likely, statically_known_true

Count = int | torch.SymInt


@dataclass(frozen=True)
class Gather:
    """One way to gather by states: from q, k, v and logs, the sums of weight * v and those of weights, [..., queries, 1].

    Query i gathers from keys up to i + offset, or from all of them: None. `dynamic`: whether offsets may be symbols, `few`:
    whether few tokens are no more work than their scores, `counted`: whether lengths must be known, `gates`: whether each
    feature may fade by itself. `behind` gathers from a state as well.
    """

    run: Callable[[Tensor, Tensor, Tensor, Logs | None, Count | None], tuple[Tensor, Tensor]]
    dynamic: bool
    few: bool = False
    counted: bool = False
    gates: bool = False
    behind: Callable[[Tensor, Tensor, Tensor, Logs | None, Count | None, Earlier], tuple[Tensor, Tensor]] | None = None

    def sums(
        self, q: Tensor, k: Tensor, v: Tensor, logs: Logs | None, offset: Count | None, past: Earlier | None
    ) -> tuple[Tensor, Tensor]:
        """What is gathered from the keys of a call and from its past."""
        if past is None:
            return self.run(q, k, v, logs, offset)
        if self.behind is not None:
            return self.behind(q, k, v, logs, offset, past)
        acc, mass = self.run(q, k, v, logs, offset)
        of_past = past.met(q, logs)
        return acc + of_past[0], mass + of_past[1]


def gatherable(operands: Operands, variant: Variant, gather: Gather) -> Linear | None:
    """What makes a call of mapped operands linear, where gathering by states saves at least half of the work, else None."""
    found = linear(variant)
    if found is None or (variant.dropout and operands.training):
        return None
    if found.behind is not None and not isinstance(offset_of(operands, found), Count if gather.dynamic else int):
        return None
    if gather.counted and not (isinstance(operands.q_len, int) and isinstance(operands.k_len, int)):
        return None
    q_len, k_len = (likely(size, UNKNOWN_LENGTH) for size in (operands.q_len, operands.k_len))
    return found if gather.few or pays(found, q_len, k_len, operands.q.shape[-1], operands.v.shape[-1]) else None


def pays(found: Linear, q_len: int, k_len: int, features: int, value_dim: int) -> bool:
    """Whether states save at least half of the multiplications."""
    return 2 * by_states(found, q_len, k_len, features, value_dim) <= q_len * k_len * (features + value_dim)


def by_states(found: Linear, q_len: int, k_len: int, features: int, value_dim: int) -> int:
    """How many multiplications states take."""
    near = 0 if found.behind is None else min(q_len, NEAR)
    return (q_len + k_len) * features * value_dim + q_len * near * (features + value_dim)


def gather_by_states(operands: Operands, variant: Variant, found: Linear, arrays: Arrays, gather: Gather) -> Sums:
    """Gather as the written-out formula would, with [batch, heads, tokens, dim] operands of the dtype `arrays.real`."""
    q, k, v = operands.q * arrays.tensor(arrays.read(variant.scale), Sort.REAL), operands.k, operands.v
    exists = _exists(operands, found, arrays)
    if exists is not None:
        k, v = (torch.where(exists, x, 0.0) for x in (k, v))
    offset = offset_of(operands, found)
    acc, mass = gather.sums(q, k, v, logs_of(operands, found, arrays), offset, earlier(operands, found, arrays))
    ones = k.new_ones((*k.shape[:-1], 1)) if exists is None else exists.to(k.dtype).expand(*k.shape[:-1], 1)
    counted = torch.cat([v, ones], dim=-1) if variant.normalizer.counts else ones
    seen = counted.sum(dim=-2, keepdim=True) if offset is None else _running(counted, offset, operands.q_len)
    seen = with_past(operands, seen.repeat_interleave(q.shape[1] // seen.shape[1], dim=1))
    sees = (seen[..., -1:] > 0).expand(*acc.shape[:-1], 1)
    mass = torch.where(sees, mass, 1.0)
    sums = Sums(acc, mass, torch.zeros_like(mass), sees)
    if not variant.normalizer.counts:
        return sums
    return replace(sums, seen=torch.where(sees, seen[..., -1:], 1.0), values=seen[..., :-1])


def offset_of(operands: Operands, found: Linear) -> Count | None:
    """How far ahead of a query's own place in the call its latest visible key stands; None where it sees all, or nobody knows."""
    if operands.past and found.behind is not None:  # queries are the last of the keys, however many these are
        ahead = operands.k_len - operands.q_len
        hint = int(likely(ahead, 0))
        return (hint if statically_known_true(ahead == hint) else ahead) - found.behind
    first_query, first_key = operands.first_query, operands.k_positions
    if first_query is None or isinstance(first_key, Tensor) or found.behind is None:
        return None
    return first_query - first_key - found.behind


def _exists(operands: Operands, found: Linear, arrays: Arrays) -> Tensor | None:
    """Which keys exist, as [batch, kv heads, keys, 1]; None where all do."""
    shown = shown_of(operands, found, arrays)
    return None if shown is None else shown[:, :: operands.q.shape[1] // operands.k.shape[1], :, None]


def _running(counted: Tensor, offset: Count, q_len: int) -> Tensor:
    """The sums of what each query sees."""
    places: Tensor = torch.arange(q_len, device=counted.device).add(offset)
    sums = counted.cumsum(dim=-2).index_select(-2, places.clamp(0, counted.shape[-2] - 1))
    return torch.where((places >= 0)[:, None], sums, 0.0)
