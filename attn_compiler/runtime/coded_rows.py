"""Calls whose keys and values are rows of codes, and which kernels read these as they lie."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.storage import PLAIN, Held, Storage
from attn_compiler.algebra.variant import Variant, passed_over
from attn_compiler.runtime import states
from attn_compiler.targets.cpp.coded import rows_of
from attn_compiler.targets.operands import Operands


def codes_objection(operands: Operands, variant: Variant) -> str | None:
    """What the kernels have against reading the codes of a call, however many queries it has; None: nothing."""
    if operands.codes is None or operands.differentiated or (operands.training and variant.dropout):
        return "they are read where no gradients are wanted and nothing is dropped"
    held = operands.codes[0].held
    if not rows_of(held):
        return f"its kernels read no codes in {held}"
    if any(part.storage != PLAIN or part.score.mentions(e.q_norm, e.k_norm) for part in variant.parts()):
        return "nothing but the cache may be held in few bits there, and no norms are known of codes"
    return "states are added up of numbers, not of codes" if states.is_alone(variant) else passed_over(variant)


def of_rows(operands: Operands, variant: Variant) -> tuple[Operands, Variant]:
    """The call whose k and v are rows of codes, as the storage of its variant says."""
    assert operands.codes is not None
    k, v = operands.codes
    return replace(operands, k=k.rows, v=v.rows), _from_cache(variant, k.held)


@lru_cache(maxsize=256)
def _from_cache(variant: Variant, held: Held) -> Variant:
    """The variant where every head's keys and values are held so."""
    groups = tuple((heads, replace(group, storage=Storage(kv_cache=held))) for heads, group in variant.groups)
    return replace(variant, storage=Storage(kv_cache=held), groups=groups)
