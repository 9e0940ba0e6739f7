"""Weights of a regression: how much each value counts in what a line through weighed keys gives at the query itself."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_compiler.targets.products import per_kv_head


def regressed(weights: Tensor, q: Tensor, k: Tensor, ridge: Tensor) -> Tensor:
    """w · (1 + W (k - m)·p), W and m being the sum of the weights and the mean of keys, and p solving a system for each query:

    (sum of w (k - m)(k - m)' + ridge) p = q - m. These add up to W. A ridge is no smaller than what rounding leaves of the sums:
    beside huge scores fewer keys than numbers would have no solution.
    """
    total = weights.sum(dim=-1, keepdim=True)
    mean = per_kv_head(weights, k) / torch.where(total == 0, 1.0, total)
    squares = per_kv_head(weights, (k[..., :, None] * k[..., None, :]).flatten(-2))
    squares = squares.reshape(*squares.shape[:-1], q.shape[-1], q.shape[-1])
    moments = squares - total[..., None] * mean[..., :, None] * mean[..., None, :]
    wide = torch.promote_types(weights.dtype, torch.float32)
    rounding = squares.diagonal(dim1=-2, dim2=-1).sum(dim=-1, keepdim=True).detach() * torch.finfo(wide).eps
    least = torch.maximum(ridge.to(moments.dtype), rounding)[..., None]
    system = moments + least * torch.eye(q.shape[-1], dtype=moments.dtype, device=q.device)
    solved: Tensor = torch.linalg.solve_ex(system.to(wide), (q - mean)[..., None].to(wide))[0][..., 0].to(q.dtype)
    along = per_kv_head(solved, k.mT) - (solved * mean).sum(dim=-1, keepdim=True)
    return weights * (1 + total * along)
