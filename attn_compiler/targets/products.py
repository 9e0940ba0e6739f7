"""Products of heads with what some of them share."""

from __future__ import annotations

from torch import Tensor


def per_kv_head(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, where several heads of `left` share one of `right`, which is not repeated."""
    heads, rows = left.shape[-3], left.shape[-2]
    kv_heads = right.shape[-3]
    if heads == kv_heads:
        return left @ right
    folded = left.reshape(*left.shape[:-3], kv_heads, heads // kv_heads * rows, left.shape[-1])
    return (folded @ right).reshape(*left.shape[:-3], heads, rows, right.shape[-1])
