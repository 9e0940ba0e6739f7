"""Opens operators that hide an attention, so that the matcher sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attn_compiler import torch_private as private


def encoder_layer(
    x: Tensor,
    width: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    gelu: bool,
    norm_first: bool,
    eps: float,
    *rest: Any,
) -> Tensor:
    """Write out the fast path of `nn.TransformerEncoderLayer` in evaluation."""
    first_weight, first_bias, second_weight, second_bias, up_weight, up_bias, down_weight, down_bias, *masks = rest
    mask, kind = (*masks, None, None)[:2]

    def attend(y: Tensor) -> Tensor:
        batch, length, _ = y.shape
        qkv = F.linear(y, qkv_weight, qkv_bias).view(batch, length, 3, heads, width // heads)
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=_visible(mask, kind, batch, length))
        return F.linear(out.transpose(1, 2).flatten(2), out_weight, out_bias)

    def feed(y: Tensor) -> Tensor:
        hidden = F.linear(y, up_weight, up_bias)
        return F.linear(F.gelu(hidden) if gelu else F.relu(hidden), down_weight, down_bias)

    def first(y: Tensor) -> Tensor:
        return F.layer_norm(y, (width,), first_weight, first_bias, eps)

    def second(y: Tensor) -> Tensor:
        return F.layer_norm(y, (width,), second_weight, second_bias, eps)

    if norm_first:
        x = x + attend(first(x))
        return x + feed(second(x))
    x = first(x + attend(x))
    return second(x + feed(x))


def _visible(mask: Tensor | None, kind: int | None, batch: int, length: int) -> Tensor | None:
    """The mask as SDPA wants it. The operator's `kind`: 0 [q, k], 1 [batch, k], 2 [batch, heads, q, k]; true is hidden."""
    if mask is None:
        return None
    shaped = {0: (1, 1, length, length), 1: (batch, 1, 1, length)}.get(2 if kind is None else kind)
    seen = mask.view(shaped) if shaped else mask
    return ~seen if seen.dtype == torch.bool else seen


LEAVES: Mapping[Any, Callable[..., Tensor]] = {private.ENCODER_LAYER: encoder_layer}
