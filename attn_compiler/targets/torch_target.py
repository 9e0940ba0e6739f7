"""Attention as plain torch operators: traced, compiled and exported like any other code, for every variant there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from attn_compiler.algebra.expr import Sort, score, true
from attn_compiler.algebra.variant import EmptyRows, Variant, passed_over, without_total
from attn_compiler.planning.site import UNKNOWN_LENGTH
from attn_compiler.targets.arrangement import Arrangement, LayOut, Layout, whole
from attn_compiler.targets.arrays import Value
from attn_compiler.targets.blocks import every_query_sees_itself, near_or_whole
from attn_compiler.targets.chunked import BY_CHUNKS, BY_SCORES
from attn_compiler.targets.contexts import in_context
from attn_compiler.targets.corrected import Solve, at_once, by_chunks, corrected
from attn_compiler.targets.corrected import refuse as refuse_delta
from attn_compiler.targets.explicit import Sums, finish, gather, log_sum_exp
from attn_compiler.targets.faded import BY_FEATURE
from attn_compiler.targets.featured import featured
from attn_compiler.targets.fused import fits, fused, swallows
from attn_compiler.targets.gathered import Gather, gather_by_states, gatherable, offset_of
from attn_compiler.targets.held_past import divided
from attn_compiler.targets.linear import NEAR, linear
from attn_compiler.targets.merging import merged
from attn_compiler.targets.mixing import Result, mixed
from attn_compiler.targets.mixing import refuse as refuse_mix
from attn_compiler.targets.operands import Operands, head_groups, in_order
from attn_compiler.targets.outputs import put_out
from attn_compiler.targets.past import continued
from attn_compiler.targets.reach import is_causal
from attn_compiler.targets.rounded import held
from attn_compiler.torch_private import likely, statically_known_true

__all__ = ["Result", "attend_densely", "attend_torch", "by_group", "refuse"]
CARRIED = ("feature", "mix", "seen", "storage", "order", "delta", "gates", "output", "context", "unrotated", "ridge")


def refuse(variant: Variant, *, lse: bool = False) -> str | None:
    """Why this target cannot carry a variant; None if it can."""
    for one in (variant, *(of_group for _, of_group in variant.groups)):
        if one.mix is not None:
            reason = refuse_mix(one.mix, lse=lse)
            if reason:
                return reason
    uncorrected = next(filter(None, map(refuse_delta, variant.parts())), None)
    return (without_total(variant) if lse else None) or uncorrected or passed_over(variant, CARRIED)


Kernel = Callable[[Operands, Variant, bool], Result | None]  # None: it has none for this


@dataclass(frozen=True)
class Way:
    """How sums over keys come about where there is a choice: in branches by a `kernel`, what is linear by `states`.

    Elsewhere tokens are laid out first.
    """

    states: Gather = BY_CHUNKS
    lay_out: LayOut = near_or_whole
    kernel: Kernel | None = None


USUAL = Way()


def attend_torch(operands: Operands, variant: Variant, *, lse: bool = False, way: Way = USUAL) -> Result:
    """Attend, in the form that the variant and what is statically known of the operands allow."""
    return by_group(operands, variant, lambda part, of_group: _attend(part, of_group, lse, way))


def by_group(operands: Operands, variant: Variant, attend: Callable[[Operands, Variant], Result]) -> Result:
    """Let every group of heads attend by itself, and put the heads back in order."""
    groups = head_groups(variant, operands.heads)
    if len(groups) == 1:
        return attend(operands, groups[0][1])
    pasts = divided(operands.past, [of_group for _, of_group in groups])
    parts = [
        attend(replace(operands.take(members), past=past), of_group)
        for (members, of_group), past in zip(groups, pasts, strict=True)
    ]
    order = [head for members, _ in groups for head in members]
    totals = [x for _, x in parts if x is not None]
    return in_order([out for out, _ in parts], order), in_order(totals, order) if totals else None


def visible_keys(arrangement: Arrangement, variant: Variant) -> Value:
    """Which keys a query sees: True for all. Real numbers in a mask decide, so they are in float64."""
    arrays = replace(arrangement.arrays, real=torch.float64)
    shown = arrays.read(variant.mask)
    if arrangement.exists is None:
        return shown
    return arrangement.exists if shown is True else arrays.tensor(shown, Sort.BOOL) & arrangement.exists


def attend_densely(operands: Operands, variant: Variant, real: torch.dtype, *, lse: bool = False) -> Result:
    """Attend to all keys by the written-out formula, in `real`, for a variant without groups: its meaning."""

    def attend(part: Operands, one: Variant, lse: bool) -> Result:
        return merged(part, one, real, real, lambda fewer, told: of_tokens(fewer, told, lse))

    def of_tokens(part: Operands, one: Variant, lse: bool) -> Result:
        mapped, plain = _prepared(part, one, real, at_once)
        arrangement = whole(mapped, real).to(real)
        return _finished(_gathered(arrangement, plain, part.training), arrangement, plain, lse)

    def gather(part: Operands, one: Variant) -> Sums:
        mapped, plain = _prepared(part, one, real, at_once)
        return _gathered(whole(mapped, real).to(real), plain, part.training, shared=True)

    if variant.mix is None:
        out, totals = attend(operands, variant, lse)
    else:
        out, totals = mixed(operands, variant.mix, attend, gather, real, lse=lse)
    return put_out(out, operands, variant, real), totals


def _prepared(operands: Operands, variant: Variant, real: torch.dtype, solve: Solve) -> tuple[Operands, Variant]:
    """Operands as they come back from their storage, then mapped, then corrected; a variant without such wishes."""
    operands, variant = operands.before_rotation(variant.unrotated), replace(variant, unrotated=())
    operands, variant = in_context(operands, variant, real)
    return corrected(*featured(held(operands, variant), variant, real), solve)


def _attend(operands: Operands, variant: Variant, lse: bool, way: Way) -> Result:
    dtype = operands.q.dtype
    real = torch.promote_types(dtype, torch.float32)
    if variant.mix is None:
        out, totals = _attend_alone(operands, variant, lse, way=way)
    else:
        attend, gather = partial(_attend_branch, way=way), partial(_gather_alone, way=way)
        out, totals = mixed(operands, variant.mix, attend, gather, real, lse=lse)
    return put_out(out, operands, variant, real).to(dtype), totals


def _attend_branch(operands: Operands, variant: Variant, lse: bool, *, way: Way) -> Result:
    found = way.kernel(operands, variant, lse) if way.kernel else None
    return _attend_alone(operands, variant, lse, way=way) if found is None else found


def _attend_alone(operands: Operands, variant: Variant, lse: bool, *, way: Way) -> Result:
    """Attend without branches."""
    dtype = operands.q.dtype
    real = torch.promote_types(dtype, torch.float32)
    return merged(operands, variant, real, dtype, lambda fewer, told: _attend_tokens(fewer, told, lse, way=way))


def _attend_tokens(operands: Operands, variant: Variant, lse: bool, *, way: Way) -> Result:
    real = torch.promote_types(operands.q.dtype, torch.float32)
    operands, variant = _prepared(operands, variant, real, by_chunks)
    sums = _by_states(operands, variant, real, way.states)
    if sums is not None:
        return _finished(sums, whole(operands, real).to(real), variant, lse)
    layout = way.lay_out(operands, variant, real)
    rule = EmptyRows.ZERO if every_query_sees_itself(operands, variant) else variant.empty_rows
    variant = replace(_shown(variant, layout), empty_rows=rule)
    causal = layout.is_whole and _is_causal(operands, variant)
    found = [_attend_arranged(operands, part, variant, lse, causal=causal) for part in layout.parts]
    out = layout.joined([one for one, _ in found])
    totals = [total for _, total in found if total is not None]
    return out, layout.totals(totals) if totals else None


def _attend_arranged(operands: Operands, arrangement: Arrangement, variant: Variant, lse: bool, *, causal: bool) -> Result:
    """What the queries of an arrangement find among its keys."""
    real, dtype = arrangement.arrays.real, operands.q.dtype
    exact_gradients = not swallows(variant.score, operands.risky)
    if lse or variant.gates is not None or not exact_gradients or not fits(variant, arrangement.arrays, dtype):
        arrangement = arrangement.to(real)
        return _finished(_gathered(arrangement, variant, operands.training), arrangement, variant, lse)
    q, k, v, arrays = arrangement.q, arrangement.k, arrangement.v, arrangement.arrays
    visible = True if causal else visible_keys(arrangement, variant)
    dropout = variant.dropout if operands.training else 0.0
    return fused(q, k, v, variant, visible, arrays, causal=causal, rule=variant.empty_rows, dropout=dropout), None


def _gather_alone(operands: Operands, variant: Variant, *, way: Way) -> Sums:
    """What a branch accumulates for a denominator that it shares."""
    real = torch.promote_types(operands.q.dtype, torch.float32)
    operands, variant = _prepared(operands, variant, real, by_chunks)
    sums = _by_states(operands, variant, real, way.states)
    if sums is not None:
        return sums
    layout = way.lay_out(operands, variant, real)
    variant = _shown(variant, layout)
    return layout.sums([_gathered(part.to(real), variant, operands.training, shared=True) for part in layout.parts])


def _shown(variant: Variant, layout: Layout) -> Variant:
    """The variant without its mask, where that hides nothing of what is laid out together."""
    return replace(variant, mask=true) if layout.shows_all else variant


def _by_states(operands: Operands, variant: Variant, real: torch.dtype, states: Gather) -> Sums | None:
    """What a linear variant accumulates, where no scores need to be made for it."""
    states = states if variant.gates is None or states.gates else BY_FEATURE
    if operands.past:
        found = linear(continued(variant))
        few = likely(operands.q_len, UNKNOWN_LENGTH) <= NEAR or not (found and isinstance(offset_of(operands, found), int))
        states = BY_SCORES if few and variant.gates is None and not states.few else states
    else:
        found = gatherable(operands, variant, states)
    if found is None:
        return None
    operands = replace(operands, q=operands.q.to(real), k=operands.k.to(real), v=operands.v.to(real))
    return gather_by_states(operands, variant, found, operands.arrays(real), states)


def _gathered(arrangement: Arrangement, variant: Variant, training: bool, *, shared: bool = False) -> Sums:
    visible = arrangement.arrays.tensor(visible_keys(arrangement, variant), Sort.BOOL)
    q, k, v = arrangement.q, arrangement.k, arrangement.v
    dropout = variant.dropout if training else 0.0
    return gather(q, k, v, variant, visible, arrangement.arrays, dropout=dropout, peak_counts=shared)


def _finished(sums: Sums, arrangement: Arrangement, variant: Variant, lse: bool) -> Result:
    out = finish(sums, arrangement.v, variant, arrangement.arrays)
    return out, log_sum_exp(sums, variant, arrangement.arrays) if lse else None


def _is_causal(operands: Operands, variant: Variant) -> bool:
    first_query, first_key = operands.first_query, operands.k_positions
    if first_query is None or isinstance(first_key, Tensor) or variant.score != score or not is_causal(variant.mask):
        return False
    return statically_known_true(first_query == first_key) and statically_known_true(operands.q_len == operands.k_len)
