"""Attention as PyTorch's own `scaled_dot_product_attention`, for variants that are a softmax over scaled products plus a bias."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.variant import SOFTMAX, EmptyRows, Variant
from attn_compiler.targets.arrays import Arrays, Value
from attn_compiler.targets.explicit import empty_row
from attn_compiler.targets.operands import PLACE

HUGE = 1 / torch.finfo(torch.float32).eps
_PRODUCTS = (e.dot, e.q_norm, e.k_norm, e.score)


def bias_of(score: Expr) -> Expr | None:
    """What `score` adds to the score it changes (0 for nothing); None where it does anything else."""
    if score == e.score:
        return e.const(0)
    if score.op not in ("add", "sub"):
        return None
    left, right = score.args
    if not right.mentions(*_PRODUCTS):
        inner, added = bias_of(left), right if score.op == "add" else -right
    elif score.op == "add" and not left.mentions(*_PRODUCTS):
        inner, added = bias_of(right), left
    else:
        return None
    if inner is None or _absorbs(added):
        return None
    if inner == e.const(0):
        return added
    return inner + added


def _absorbs(added: Expr) -> bool:
    """Whether a bias may swallow the score, and in a row's log-sum-exp its mass, from which the operator derives gradients."""
    constants = [float(x.value) for x in added.walk() if x.is_const and x.sort is Sort.REAL]  # type: ignore[arg-type]
    return any(HUGE <= abs(x) < math.inf for x in constants)


def swallows(score: Expr, risky: Collection[str]) -> bool:
    """Whether a score reads numbers, other ones for each key, from a table that may hold huge ones."""
    read = (x for x in score.walk() if x.op == "table" and x.value in risky)
    return any(at.mentions(e.k, PLACE) for table in read for at in table.args)


def fits(variant: Variant, arrays: Arrays, dtype: torch.dtype) -> bool:
    """Whether the variant is one for this form, without losing precision: a bias must be of the operands' dtype."""
    bias = bias_of(variant.score)
    if variant.normalizer != SOFTMAX or variant.storage.pv or bias is None or variant.scale.mentions(e.k, *_PRODUCTS):
        return False
    stored = bias.op == "table" and str(bias.value) in arrays.tables and arrays.tables[str(bias.value)].dtype == dtype
    return bias == e.const(0) or stored or dtype in (torch.float32, torch.float64)


def fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variant: Variant,
    visible: Value,
    arrays: Arrays,
    *,
    causal: bool,
    rule: EmptyRows,
    dropout: float = 0.0,
) -> Tensor:
    """Attend with [..., heads, tokens, dim] operands; `causal` stands for mask and bias, else `visible` does (True: all keys)."""
    scale = arrays.read(variant.scale)
    if isinstance(scale, Tensor):
        q, scale = (q.to(arrays.real) * scale).to(q.dtype), 1.0
    bias = bias_of(variant.score)
    assert bias is not None
    added = None if bias == e.const(0) else arrays.tensor(arrays.read(bias), Sort.REAL)
    mask, sees = (None, None) if causal else _mask(visible, added, rule, arrays)
    mask = mask.to(q.dtype) if mask is not None and mask.dtype != torch.bool else mask
    out = _call(q, k, v, mask, causal=causal, scale=float(cast(float, scale)), dropout=dropout)
    return out if sees is None else torch.where(sees, out, empty_row(v, q.shape[-3], rule))


def _mask(visible: Value, added: Tensor | None, rule: EmptyRows, arrays: Arrays) -> tuple[Tensor | None, Tensor | None]:
    """The mask that the operator takes, and which rows see anything, where those that do not get the mean."""
    shown = None if visible is True else arrays.tensor(visible, Sort.BOOL)
    if rule is not EmptyRows.ZERO and added is not None:
        finite = added != -math.inf
        shown = finite if shown is None else shown & finite
    sees = None
    if rule is not EmptyRows.ZERO and shown is not None:
        sees = shown.any(dim=-1, keepdim=True)
        if rule is EmptyRows.UNMASKED:
            shown, sees = shown | ~sees, None
    if added is None or shown is None:
        return (shown if added is None else added), sees
    return torch.where(shown, added, -math.inf), sees


def _call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, scale: float, dropout: float) -> Tensor:
    grouped = bool(q.shape[-3] != k.shape[-3])
    mask = mask if mask is None else mask[(None,) * max(0, 2 - mask.ndim)]
    if q.ndim == 4:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    lead = q.shape[:2]
    if mask is not None:
        mask = mask.expand(*lead, *mask.shape[-3:]).flatten(0, 1) if mask.ndim > 2 else mask
    flat = _call(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask, causal=causal, scale=scale, dropout=dropout)
    return flat.reshape(*lead, *flat.shape[1:])
