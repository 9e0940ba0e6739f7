"""The past as a state: what linear attention needs of earlier tokens, whose number it does not grow with.

A state is [batch, heads, features + 1, value dim + 1]. Its rows are the sums of feature * [v, 1], what a decay leaves of them at
the last token; the row below them holds the sums of [v, 1], which no decay touches: how many keys there are, and their values.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.storage import PLAIN
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError
from attn_compiler.targets.arrays import Arrays
from attn_compiler.targets.corrected import by_chunks, corrected
from attn_compiler.targets.fading import Logs, left_of, log_before, logs_of, shown_of
from attn_compiler.targets.featured import featured
from attn_compiler.targets.linear import Linear, linear
from attn_compiler.targets.operands import Operands
from attn_compiler.targets.products import per_kv_head


def objection(variant: Variant) -> str | None:
    """Why the past of a variant without groups and branches is no state, whatever its latest tokens are; None if it is one."""
    found = linear(variant)
    if found is None:
        return "it is not linear, so it needs every key that it sees"
    if variant.storage != PLAIN:
        return "its operands are held in few bits, and a state is added up of numbers"
    return (
        "its queries see keys that come after them: make its mask `causal`" if found.behind is None or found.behind < 0 else None
    )


def continued(variant: Variant) -> Variant:
    """The variant behind a past: a single new query sees no key ahead of it, though no mask says so."""
    groups = tuple((heads, continued(of_group)) for heads, of_group in variant.groups)
    if variant.mix is None:
        return replace(variant, mask=variant.mask & (e.k <= e.q), groups=groups)
    branches = tuple((name, continued(branch)) for name, branch in variant.mix.branches)
    return replace(variant, mix=replace(variant.mix, branches=branches), groups=groups)


def remembered(operands: Operands, variant: Variant, past: Tensor | None) -> Tensor:
    """The state after the tokens of a call, whose past is a state, or nothing."""
    real = torch.promote_types(operands.k.dtype, torch.float32)
    found = linear(variant)
    assert found is not None
    operands = operands.before_rotation(variant.unrotated)
    mapped, _ = corrected(*featured(replace(operands, past=() if past is None else (past,)), variant, real), by_chunks)
    k, v, arrays = mapped.k.to(real), mapped.v.to(real), operands.arrays(real)
    v = torch.cat([v, v.new_ones((*v.shape[:-1], 1))], dim=-1)
    logs = logs_of(mapped, found, arrays)
    if logs:
        k, v = (x.repeat_interleave(operands.q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    shown = shown_of(operands, found, arrays)
    if shown is not None:
        shown = shown[:, :: operands.q.shape[1] // k.shape[1], :, None]
        k, v = torch.where(shown, k, 0.0), torch.where(shown, v, 0.0)
    count = v.sum(dim=-2, keepdim=True)
    if logs:
        k = k * left_of(logs[1][:, :, -1:], logs[1], k)
    added = torch.cat([k.mT @ v, count], dim=-2)
    if past is None:
        return added
    if past.shape != added.shape:
        expected, given = list(added.shape), list(past.shape)
        raise ShapeError(f"expected a `past` of {expected}, as an earlier step with this variant returned it; found {given}")
    if logs is None:
        return past + added
    left = left_of(logs[1][:, :, -1:], log_before(mapped, found, arrays), k)
    return torch.cat([past[..., :-1, :] * left.mT, past[..., -1:, :]], dim=-2) + added


class Earlier(NamedTuple):
    """What queries gather from of a state, and the running log at the last of its tokens."""

    sums: Tensor  # [batch, heads, features, value dim + 1]
    log: Tensor | None  # [batch, heads, 1], or [batch, heads, 1, features]

    def met(self, q: Tensor, logs: Logs | None) -> tuple[Tensor, Tensor]:
        """What mapped and scaled queries gather: the sums of weight * v, and those of weights, [..., queries, 1]."""
        if logs is not None and self.log is not None:
            q = q * left_of(logs[0], self.log, q)
        added = per_kv_head(q, self.sums)
        return added[..., :-1], added[..., -1:]


def earlier(operands: Operands, found: Linear, arrays: Arrays) -> Earlier | None:
    """The past of a call; None where it has none."""
    if not operands.past:
        return None
    (past,) = operands.past
    return Earlier(past[..., :-1, :], None if found.fades is None else log_before(operands, found, arrays))


def with_past(operands: Operands, seen: Tensor) -> Tensor:
    """Sums of what is seen, [batch, heads, queries, …], once the past has been counted, too."""
    if not operands.past:
        return seen
    count = operands.past[0][..., -1:, -seen.shape[-1] :]
    return seen + count.repeat_interleave(seen.shape[1] // count.shape[1], dim=1)
