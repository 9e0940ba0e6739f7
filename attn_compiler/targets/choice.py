"""What the torch target would run for a site, and whether that beats what the model runs by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import get_args

from attn_compiler.algebra.expr import const, i, score
from attn_compiler.algebra.storage import PLAIN
from attn_compiler.algebra.variant import SOFTMAX, EmptyRows, Variant
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.planner import Carried
from attn_compiler.planning.site import Form, Site
from attn_compiler.targets.blocks import pays
from attn_compiler.targets.fused import bias_of, swallows
from attn_compiler.targets.gathered import pays as states_pay
from attn_compiler.targets.held import lost
from attn_compiler.targets.held_past import unremembered
from attn_compiler.targets.linear import linear
from attn_compiler.targets.operands import Operands
from attn_compiler.targets.past import continued
from attn_compiler.targets.reach import is_causal, reach, shows_itself
from attn_compiler.targets.torch_target import Result, attend_torch, refuse

# From the slowest to the fastest.
_RANK = {form: rank for rank, form in enumerate(get_args(Form))}
# What PyTorch has one operator for, whole, and whether that hides the future.
FUSED_WHOLE: Mapping[Form, bool] = {"scaled_dot_product_attention": False, "scaled_dot_product_attention(is_causal)": True}
FUSED: tuple[Form, ...] = (*FUSED_WHOLE, "scaled_dot_product_attention with a mask")


class TorchTarget:
    """Plain torch operators."""

    name = "torch"

    def refuse(self, operands: Operands, variant: Variant, *, lse: bool = False) -> str | None:
        return refuse(variant, lse=lse)

    def attend(self, operands: Operands, variant: Variant, *, lse: bool = False) -> Result:
        return attend_torch(operands, variant, lse=lse)

    def carry(self, site: Site, variant: Variant) -> Carried | Refusal:
        if site.recalls:
            behind = continued(variant)
            reason = refuse(behind) or unremembered(site, behind)
            return Refusal("torch", reason) if reason else Carried(_from_states(site), gains=True)
        reason = refuse(variant) or lost(site, variant)
        if reason:
            return Refusal("torch", reason)
        forms = [form_of(site, part) for part in _alone(variant)]
        slowest = min(forms, key=_RANK.__getitem__)
        held = any(part.storage not in (PLAIN, site.computes.storage) for part in variant.parts())
        emulated = ", of operands rounded as they would be held" if held else ""
        gains = site.kept is not None or _RANK[slowest] > _RANK[site.form]
        solved = any(part.normalizer.ridge is not None for part in variant.parts())
        solving = f", and {site.head_dim} equations solved for each query" if solved else ""
        return Carried(" and ".join(dict.fromkeys(forms)) + solving + emulated, gains and not solved)


def _from_states(site: Site) -> str:
    """How the past of a site is met whose earlier keys are gone."""
    states = "a state" if site.recalls == 1 else f"{site.recalls} states"
    window = f", beside the latest {site.kept.latest} tokens" if site.kept and site.kept.latest else ""
    return f"{states}, which tokens meet and join{window}"


def _alone(variant: Variant) -> Iterator[Variant]:
    """The groups and branches of a variant, or itself."""
    for group in [group for _, group in variant.groups] or [variant]:
        yield from [group] if group.mix is None else (branch for _, branch in group.mix.branches)


def form_of(site: Site, variant: Variant) -> Form:
    """How a variant runs at a site."""
    found = linear(variant)
    if found and site.frame and states_pay(found, site.q_hint, site.k_hint, variant.feature.width(site.head_dim), site.value_dim):
        return "states, to which keys are added up chunk by chunk"
    if _in_blocks(site, variant):
        return "blocks of queries, each with the keys in reach"
    bias = bias_of(variant.score)
    if variant.normalizer != SOFTMAX or variant.storage.pv or bias is None or swallows(variant.score, site.risky):
        return "written out"
    aligned = site.frame is not None and site.frame.position == i and site.q_len == site.k_len
    if variant.mask.value is True and bias == const(0):
        return "scaled_dot_product_attention"
    if aligned and variant.score == score and is_causal(variant.mask):
        return "scaled_dot_product_attention(is_causal)"
    return "scaled_dot_product_attention with a mask"


def _in_blocks(site: Site, variant: Variant) -> bool:
    if site.frame is None or site.frame.position.tables():
        return False
    within = reach(variant.mask)
    if within is None or (variant.empty_rows is not EmptyRows.ZERO and not shows_itself(variant.mask)):
        return False
    return pays(within, site.q_hint, site.k_hint) is not None
