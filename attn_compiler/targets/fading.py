"""What linear attention has to know of each token besides its features: whether it is there, and the running log of a decay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import IntEnum

import torch
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.feature import component
from attn_compiler.targets.arrays import Arrays, Value
from attn_compiler.targets.linear import Linear
from attn_compiler.targets.operands import Operands
from attn_compiler.torch_private import statically_known_true


class Fading(IntEnum):
    """What of a state fades by a log of its own: all of it, each row or each column; the values are the axes of such logs."""

    TOGETHER = 3  # [batch, heads, tokens]
    ROWS = 4  # [batch, heads, tokens, features]
    COLUMNS = 5  # [batch, heads, tokens, 1, value dim]

    @classmethod
    def of(cls, logs: Sequence[Tensor]) -> Fading:
        """What fades by some logs; without any, nothing does."""
        return cls(logs[0].ndim) if logs else cls.TOGETHER


# Of a decay, running, at queries and at keys: [batch, heads, tokens] in float64, and [..., features] where these fade apart.
Logs = tuple[Tensor, Tensor]


def logs_of(operands: Operands, found: Linear, arrays: Arrays) -> Logs | None:
    """The running logs of a decay: they grow with the length, and only their differences count."""
    if found.fades is None:
        return None
    if found.fades.mentions(component):
        k_positions = operands.k_positions
        at_key = k_positions if isinstance(k_positions, Tensor) else arrays.symbols[e.k]
        assert isinstance(at_key, Tensor)
        of_k = _of_features(operands, found.fades, arrays, at_key[..., None], operands.k_len, e.k in arrays.whole)
        ahead = _ahead(operands)
        if ahead is not None:
            return of_k[:, :, ahead : ahead + operands.q_len], of_k
        return _of_features(operands, found.fades, arrays, arrays.symbols[e.q], operands.q_len, e.q in arrays.whole), of_k
    exactly = replace(arrays, real=torch.float64)
    at_k = exactly.tensor(exactly.read(found.fades), Sort.REAL)
    at_q = exactly.tensor(exactly.read(found.fades.substitute({e.k: e.q})), Sort.REAL)
    lead = operands.q.shape[:2]
    return at_q.expand(*lead, operands.q_len, 1)[..., 0], at_k.expand(*lead, 1, operands.k_len)[:, :, 0]


def log_before(operands: Operands, found: Linear, arrays: Arrays) -> Tensor:
    """The running log at the last token before the first key, [batch, heads, 1]; [..., features] where these fade apart."""
    assert found.fades is not None
    assert not isinstance(operands.k_positions, Tensor)
    if found.fades.mentions(component):
        return _of_features(operands, found.fades, arrays, operands.k_positions - 1, 1)
    exactly = replace(arrays, real=torch.float64, whole={leaf: n for leaf, n in arrays.whole.items() if leaf != e.k})
    log = exactly.tensor(exactly.read(found.fades, {e.k: operands.k_positions - 1}), Sort.REAL)
    return log.expand(operands.q.shape[0], operands.q.shape[1], 1, 1)[..., 0]


def _ahead(operands: Operands) -> int | None:
    """How far behind the first key the first query stands, if all queries are known to stand where a key does."""
    first_query, first_key = operands.first_query, operands.k_positions
    if not (isinstance(first_query, int) and isinstance(first_key, int)):
        return None
    ahead = first_query - first_key
    return ahead if ahead >= 0 and statically_known_true(ahead + operands.q_len <= operands.k_len) else None


def _of_features(operands: Operands, fades: Expr, arrays: Arrays, at: Value, tokens: int, counted: bool = False) -> Tensor:
    """The running logs of all features at some tokens, whose positions are a column; `counted`: 0, 1, 2, …"""
    features = torch.arange(operands.q.shape[-1], device=operands.q.device)
    symbols = {**arrays.symbols, e.k: at, component: features}
    whole = {x: arrays.whole[x] for x in (e.b, e.h) if x in arrays.whole} | {component: 1} | ({e.k: 2} if counted else {})
    exactly = replace(arrays, real=torch.float64, symbols=symbols, whole=whole)
    return exactly.tensor(exactly.read(fades), Sort.REAL).expand(*operands.q.shape[:2], tokens, features.shape[0])


def shown_of(operands: Operands, found: Linear, arrays: Arrays) -> Tensor | None:
    """Which keys exist, as [batch, heads, keys]; None where all do."""
    if found.shown == e.true:
        return None
    shown = arrays.tensor(arrays.read(found.shown), Sort.BOOL)
    return shown.expand(operands.q.shape[0], operands.q.shape[1], 1, operands.k_len)[:, :, 0]


def fading(later: Tensor, earlier: Tensor, like: Tensor) -> Tensor:
    """What is left of something at a later time, in the precision of `like`."""
    return (later - earlier).to(like.dtype).clamp(max=0.0).exp()


def left_of(later: Tensor, earlier: Tensor, like: Tensor) -> Tensor:
    """What is left of the rows of `like`, [batch, heads, tokens, 1], or of each feature of these."""
    left = fading(later, earlier, like)
    return left if left.ndim == like.ndim else left[..., None]
