"""The formula of attention, written out: scores, visible keys, weights, output. For every variant; scores are materialized."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.feature import component
from attn_compiler.algebra.variant import EmptyRows, Variant
from attn_compiler.errors import ShapeError
from attn_compiler.targets.arrays import Arrays, Value
from attn_compiler.targets.products import per_kv_head
from attn_compiler.targets.regressed import regressed
from attn_compiler.targets.rounded import held_weights, sorted_keys


@dataclass(frozen=True)
class Sums:
    """What queries gather from the keys that they see, whichever way that was computed; `sees`: whether these are any.

    `seen` and `values` (how many keys there are, and the sum of their v) are there where the normalizer asks for them.
    """

    acc: Tensor
    mass: Tensor
    peak: Tensor
    sees: Tensor
    seen: Tensor | None = None
    values: Tensor | None = None

    def known(self) -> dict[Expr, Value]:
        """What a normalizer's output may speak of."""
        always: dict[Expr, Value] = {e.acc: self.acc, e.mass: self.mass, e.peak: self.peak}
        asked = {e.seen: self.seen, e.values: self.values}
        return always | {leaf: x for leaf, x in asked.items() if x is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Sums:
        """The same with `change` applied to each of these."""
        return Sums(*(None if x is None else change(x) for x in vars(self).values()))  # type: ignore[arg-type]


def gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variant: Variant,
    visible: Tensor,
    arrays: Arrays,
    *,
    dropout: float = 0.0,
    peak_counts: bool = False,
) -> Sums:
    """Gather with [..., heads, tokens, dim] operands of the dtype `arrays.real`, from keys that `visible` shows.

    `peak_counts`: what becomes of the sums depends on the peak, and gradients pass through it. Where a normalizer alone makes
    the output of them it cancels. Gradients stay finite where a row sees nothing: what is not visible is replaced before it is
    computed with.
    """
    scores = _scores(q, k, variant, arrays)
    shape = scores.shape
    visible = visible & (scores != -math.inf)
    sees = visible.any(dim=-1, keepdim=True)
    if variant.empty_rows is EmptyRows.UNMASKED:
        visible = visible | ~sees
        sees = torch.ones_like(sees) if _has_keys(k) else sees
    peak = _peak(torch.where(visible, scores, -math.inf), sees)
    peak = peak if peak_counts else peak.detach()
    scores = torch.where(visible, scores, peak)
    weights = arrays.tensor(arrays.read(variant.normalizer.weight, {e.score: scores, e.peak: peak}), Sort.REAL)
    weights = torch.where(visible, weights, 0.0).expand(shape)
    if variant.normalizer.ridge is not None:
        ridge = arrays.tensor(arrays.read(variant.normalizer.ridge, {e.peak: peak}), Sort.REAL)
        weights = regressed(weights, q, k, ridge)
    mass = torch.where(sees, weights.sum(dim=-1, keepdim=True), 1.0)
    if variant.storage.pv:
        weights = held_weights(weights, variant.storage.pv.numbers, sorted_keys(arrays, variant.order))
    if dropout > 0:
        weights = F.dropout(weights, dropout)
    acc = per_kv_head(weights, v)
    if not variant.normalizer.counts:
        return Sums(acc, mass, peak, sees)
    shown = visible.to(arrays.real).expand(shape)
    return Sums(acc, mass, peak, sees, torch.where(sees, shown.sum(dim=-1, keepdim=True), 1.0), per_kv_head(shown, v))


def finish(sums: Sums, v: Tensor, variant: Variant, arrays: Arrays) -> Tensor:
    """The output of what was gathered."""
    out = arrays.tensor(arrays.read(variant.normalizer.output, sums.known()), Sort.REAL)
    return torch.where(sums.sees, out, empty_row(v, out.shape[-3], variant.empty_rows))


def log_sum_exp(sums: Sums, variant: Variant, arrays: Arrays) -> Tensor:
    """The log of what the output was divided by, as if no peak had been subtracted."""
    total = variant.normalizer.total
    if total is None:
        raise ShapeError(f"the rows of `{variant.normalizer.name}` are not normalized, so they have no log-sum-exp")
    mass = torch.where(sums.sees, sums.mass, 0.0)
    amount = arrays.tensor(arrays.read(total, sums.known() | {e.mass: mass}), Sort.REAL).expand(sums.peak.shape)
    peak = sums.peak if variant.normalizer.tracks_peak else torch.zeros_like(sums.peak)
    return torch.where(amount > 0, torch.log(torch.where(amount > 0, amount, 1.0)) + peak, -math.inf).squeeze(-1)


def empty_row(v: Tensor, heads: int, rule: EmptyRows) -> Tensor:
    """What a query that sees no key gets, to broadcast over [..., heads, queries, dim]."""
    if rule is EmptyRows.NAN:
        return v.new_full((), math.nan)
    if rule is EmptyRows.ZERO or not _has_keys(v):
        return v.new_zeros(())
    return v.mean(dim=-2, keepdim=True).repeat_interleave(heads // v.shape[-3], dim=-3)


def _scores(q: Tensor, k: Tensor, variant: Variant, arrays: Arrays) -> Tensor:
    products = per_kv_head(q, k.transpose(-2, -1)) if variant.gates is None else _one_by_one(q, k, variant.gates, arrays)
    computed = variant.score.substitute({e.score: e.dot * variant.scale})
    known = {e.dot: products}
    if computed.mentions(e.q_norm):
        known[e.q_norm] = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    if computed.mentions(e.k_norm):
        norms = torch.linalg.vector_norm(k, dim=-1).unsqueeze(-2)
        known[e.k_norm] = norms.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    return arrays.tensor(arrays.read(computed, known), Sort.REAL).expand(products.shape)


def _one_by_one(q: Tensor, k: Tensor, gates: Expr, arrays: Arrays) -> Tensor:
    """Products whose terms fade each by its own gate, which is not more than 1; ahead of the query logs say nothing."""
    k, exactly = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3), replace(arrays, real=torch.float64)
    total = q.new_zeros((*q.shape[:-1], k.shape[-2]))
    for feature in range(q.shape[-1]):
        at_key = gates.substitute({component: e.const(feature)})
        left = exactly.tensor(exactly.read(e.minimum(at_key.substitute({e.k: e.q}) - at_key, 0.0)), Sort.REAL)
        total = total + q[..., feature, None] * k[..., None, :, feature] * left.to(q.dtype).exp()
    return total


def _has_keys(k: Tensor) -> bool:
    return not (isinstance(k.shape[-2], int) and k.shape[-2] == 0)


def _peak(scores: Tensor, sees: Tensor) -> Tensor:
    if not _has_keys(scores.mT):
        return scores.new_zeros(sees.shape)
    return torch.where(sees, scores.amax(dim=-1, keepdim=True), 0.0)
