"""What operands become by being held in few bits: rounded to what their codes and scales say, exactly as a kernel would."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.storage import PLAIN, Held, Numbers, Scaling, Shared
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError
from attn_compiler.targets.arrays import Arrays
from attn_compiler.targets.operands import PLACE, Operands
from attn_compiler.targets.scaled import rounded

Places = tuple[Tensor | None, Tensor | None]  # of queries and of keys
AS_THEY_COME: Places = (None, None)
_CHANNELS, _TOKENS = -1, -2  # the axes that products sum over


def held(operands: Operands, variant: Variant) -> Operands:
    """The operands as they come back from their storage, in float32 at least. Gradients pass as if nothing was rounded."""
    storage = variant.storage
    if storage == PLAIN:
        return operands
    of_q, of_k = sorted_tokens(operands, variant.order)
    real = torch.promote_types(operands.q.dtype, torch.float32)
    q, k, v = (x.to(real) for x in (operands.q, operands.k, operands.v))
    if storage.kv_cache:
        k, v = (held_tensor(x, storage.kv_cache.of(n), places=of_k) for n, x in enumerate((k, v)))
    if storage.qk:
        # What all scores of a query share, a softmax does not notice: nothing is gained by smoothing q.
        q = held_tensor(q, replace(storage.qk.of(0), smooth=False), places=of_q)
        k = held_tensor(k, storage.qk.of(1), places=of_k)
    if storage.pv:
        v = held_tensor(v, storage.pv, _TOKENS, places=of_k)
    return replace(operands, q=q, k=k, v=v)


def sorted_tokens(operands: Operands, rank: Expr | None) -> Places:
    """The places of queries and of keys in an order, [1 or batch, 1 or heads, tokens, 1]; none where they stay as they come."""
    if rank is None:
        return AS_THEY_COME
    arrays = operands.arrays(torch.float32)
    of_q, of_k = _sorted(arrays, rank.substitute({e.k: e.q}), e.i), sorted_keys(arrays, rank)
    assert of_k is not None
    if of_k.shape[1] not in (1, operands.k.shape[1]):
        raise ShapeError("keys that heads share cannot be cut into blocks where each head has positions of its own")
    return of_q, of_k.mT


def sorted_keys(arrays: Arrays, rank: Expr | None) -> Tensor | None:
    """The places of keys in an order, [1 or batch, 1 or heads, 1, keys]; those of equal rank as they come."""
    return None if rank is None else _sorted(arrays, rank, PLACE)


def _sorted(arrays: Arrays, rank: Expr, token: Expr) -> Tensor:
    ranks, tokens = arrays.tensor(arrays.read(rank), Sort.INDEX), arrays.symbols[token]
    assert isinstance(tokens, Tensor)
    ranks = ranks + torch.zeros_like(tokens)  # which may be one number for all tokens
    return ranks[(None,) * (4 - ranks.ndim)].argsort(dim=-1 if token == PLACE else -2, stable=True)


def held_tensor(x: Tensor, how: Held, along: int = _CHANNELS, *, places: Tensor | None = None) -> Tensor:
    """[..., tokens, channels] as they come back; a product sums over the axis `along`, in which types cut their own blocks.

    Blocks of tokens are cut where these stand at `places`, [..., tokens, 1].
    """
    given = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.numel() == 0:
        return given
    real = given.detach().to(torch.float32)  # in which codes are found, whatever is computed in: they are part of the meaning
    mean = real.mean(dim=-2, keepdim=True) if how.smooth else None
    centered = real if mean is None else real - mean
    apart = kept_apart(real, how)
    stored = centered if apart is None else torch.where(apart, 0.0, centered)
    size = how.per.size if how.per else how.numbers.block if along == _TOKENS else 0
    back = _in_order(
        stored, places if size else None, _TOKENS, lambda one: rounded(one, how.numbers, how.per, along, how.largest)
    )
    back = (back if mean is None else back + mean).to(given.dtype)
    back = back if apart is None else torch.where(apart, given.detach(), back)
    return straight_through(given, back)


def kept_apart(x: Tensor, how: Held) -> Tensor | None:
    """Which channels are kept as they are, [..., 1, channels]; None where no number is an outlier."""
    if math.isinf(how.outliers) or x.numel() == 0:
        return None
    return x.detach().to(torch.float32).abs().amax(dim=-2, keepdim=True) >= how.outliers


def held_weights(weights: Tensor, numbers: Numbers, places: Tensor | None = None) -> Tensor:
    """[..., queries, keys] as they come back; each row has a scale, and no sign where nothing is negative.

    Blocks that a type cuts itself are those of keys at `places`, [..., 1, keys].
    """
    if weights.numel() == 0:
        return weights
    real = weights.detach().to(torch.float32)
    per = Shared("token") if numbers.scaling is Scaling.REAL else None
    back = _in_order(real, places if numbers.block else None, -1, lambda one: rounded(one, numbers, per, -1))
    if numbers.unsigned:
        back = torch.where((real < 0).any(dim=-1, keepdim=True), back, rounded(real, _without_sign(numbers), per, -1))
    return straight_through(weights, back.to(weights.dtype))


def _in_order(x: Tensor, places: Tensor | None, axis: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """What `change` makes of the tokens along an axis where they stand at `places`, each put back to where it came from."""
    if places is None:
        return change(x)
    at = places.expand(x.shape)
    return torch.zeros_like(x).scatter(axis, at, change(x.gather(axis, at)))


def _without_sign(numbers: Numbers) -> Numbers:
    return replace(numbers, mantissa=numbers.mantissa + 1, smallest=numbers.smallest + 1, largest=numbers.unsigned)


def straight_through(given: Tensor, back: Tensor) -> Tensor:
    """`back`, whose gradient is that of `given`, where this is finite."""
    if not torch.is_grad_enabled():
        return back
    return back.detach() + torch.where(given.isfinite(), given - given.detach(), 0.0)  # zero, exactly
