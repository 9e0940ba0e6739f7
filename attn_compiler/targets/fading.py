"""What linear attention has to know of each token besides its features: whether it is there, and the running log of a decay."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.feature import component
from attn_compiler.targets.arrays import Arrays, Value
from attn_compiler.targets.linear import Linear
from attn_compiler.targets.operands import Operands

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
        of_q = _of_features(operands, found.fades, arrays, arrays.symbols[e.q], operands.q_len)
        return of_q, _of_features(operands, found.fades, arrays, at_key[..., None], operands.k_len)
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


def _of_features(operands: Operands, fades: Expr, arrays: Arrays, at: Value, tokens: int) -> Tensor:
    """The running logs of all features at some tokens, whose positions are a column."""
    features = torch.arange(operands.q.shape[-1], device=operands.q.device)
    symbols = {**arrays.symbols, e.k: at, component: features}
    exactly = replace(arrays, real=torch.float64, symbols=symbols, whole={})
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
