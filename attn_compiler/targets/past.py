"""The past as a state: what linear attention needs of earlier tokens, whose number it does not grow with.

A state is [batch, heads, features + 1, value dim + 1]. Its rows are the sums of feature * [v, 1], what a decay leaves of them at
the last token; the row below them holds the sums of [v, 1], which no decay touches: how many keys there are, and their values.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Sort
from attn_compiler.algebra.variant import Variant, reads
from attn_compiler.errors import ShapeError
from attn_compiler.targets.arrays import Arrays
from attn_compiler.targets.explicit import per_kv_head
from attn_compiler.targets.fading import fading, logs_of, shown_of
from attn_compiler.targets.featured import featured
from attn_compiler.targets.linear import Linear, linear
from attn_compiler.targets.operands import Operands


def objection(variant: Variant) -> str | None:
    """Why the past of a variant cannot be a state; None if it can."""
    if variant.groups or variant.mix is not None:
        return "its heads or branches compute several things, and a state stands for the past of one"
    found = linear(variant)
    if found is None:
        return "it is not linear, so it needs every key that it sees"
    if variant.delta is not None:
        return "a delta rule corrects what the state holds, which steps do not do yet"
    if found.behind is None:
        return "its queries see keys that come after them: make its mask `causal`"
    return None if found.behind == 0 else f"its queries see keys {found.behind} tokens behind them and further back, not all"


def remembers(variant: Variant) -> bool:
    """Whether a state is all that an attention needs of its past, wherever in a text it stands."""
    return objection(variant) is None and not any(node.mentions(e.q, e.k) for node in reads(variant))


def continued(variant: Variant) -> Linear | None:
    """What makes a variant linear whose past is a state; a single new query sees none ahead of it, though no mask says so."""
    return linear(replace(variant, mask=variant.mask & (e.k <= e.q)))


def remembered(operands: Operands, variant: Variant, past: Tensor | None) -> Tensor:
    """The state after the tokens of a call, whose past is a state, or nothing."""
    real = torch.promote_types(operands.k.dtype, torch.float32)
    found = linear(variant)
    assert found is not None
    mapped, _ = featured(operands, variant, real)
    k, v, arrays = mapped.k.to(real), mapped.v.to(real), operands.arrays(real)
    v = torch.cat([v, v.new_ones((*v.shape[:-1], 1))], dim=-1)
    logs = logs_of(operands, found, arrays)
    if logs:
        k, v = (x.repeat_interleave(operands.heads // x.shape[1], dim=1) for x in (k, v))
    shown = shown_of(operands, found, arrays)
    if shown is not None:
        shown = shown[:, :: operands.heads // k.shape[1], :, None]
        k, v = torch.where(shown, k, 0.0), torch.where(shown, v, 0.0)
    count = v.sum(dim=-2, keepdim=True)
    if logs:
        k = k * fading(logs[1][..., -1:], logs[1], k)[..., None]
    added = torch.cat([k.mT @ v, count], dim=-2)
    if past is None:
        return added
    if past.shape != added.shape:
        expected, given = list(added.shape), list(past.shape)
        raise ShapeError(f"expected a `past` of {expected}, as an earlier step with this variant returned it; found {given}")
    if logs is None:
        return past + added
    left = fading(logs[1][..., -1:], _log_before(operands, found, arrays), k)[..., None]
    return torch.cat([past[..., :-1, :] * left, past[..., -1:, :]], dim=-2) + added


def with_past(
    operands: Operands, found: Linear, arrays: Arrays, q: Tensor, sums: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of weight * v, of weights and of what is seen, once the mapped and scaled queries have met their past."""
    acc, mass, seen = sums
    past = operands.past
    assert past is not None
    logs = logs_of(operands, found, arrays)
    reached = q if logs is None else q * fading(logs[0], _log_before(operands, found, arrays), q)[..., None]
    added = per_kv_head(reached, past[..., :-1, :])
    count = past[..., -1:, -seen.shape[-1] :]
    count = count.repeat_interleave(seen.shape[1] // count.shape[1], dim=1)
    return acc + added[..., :-1], mass + added[..., -1:], seen + count


def _log_before(operands: Operands, found: Linear, arrays: Arrays) -> Tensor:
    """The running log at the last token of the past, [batch, heads, 1]."""
    assert found.fades is not None
    assert not isinstance(operands.k_positions, Tensor)
    exactly = replace(arrays, real=torch.float64, whole={leaf: n for leaf, n in arrays.whole.items() if leaf != e.k})
    log = exactly.tensor(exactly.read(found.fades, {e.k: operands.k_positions - 1}), Sort.REAL)
    return log.expand(operands.q.shape[0], operands.heads, 1, 1)[..., 0]
