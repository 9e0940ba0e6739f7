"""The product of activations and weights that are both held in few bits; columns with outliers stay as they are (LLM.int8)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from attn_compiler.algebra.storage import Held
from attn_compiler.targets.rounded import held_tensor, kept_apart


def projected(x: Tensor, weight: Tensor, how: Held) -> Tensor:
    """[rows, in] times [out, in], in float32 at least: each row of either has scales of its own.

    Which columns hold an outlier, all rows of a call say together; there neither factor is rounded.
    """
    activations, weights = held_tensor(x, how), held_tensor(weight, replace(how, outliers=math.inf))
    apart = kept_apart(x, how)
    if apart is not None:
        weights = torch.where(apart, weight.to(weights.dtype), weights)
    wide = torch.promote_types(activations.dtype, weights.dtype)
    return activations.to(wide) @ weights.to(wide).mT
