"""Makes the tables that follow from the input of a block, by plain operators in front of whatever attends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Sort
from attn_compiler.algebra.feature import component, x
from attn_compiler.algebra.made import Made, Taken, channel
from attn_compiler.algebra.variant import Variant
from attn_compiler.targets.arrays import Arrays
from attn_compiler.targets.operands import Operands


def with_made(operands: Operands, variant: Variant, block: Mapping[str, Tensor]) -> Operands:
    """The same call with the tables that its variant makes of its block's tensors, [batch, tokens, channels]."""
    made = {
        one.name: block[one.source] if isinstance(one, Taken) else _made(operands, one, block["x"])
        for part in variant.parts()
        for one in part.made
    }
    return replace(operands, tables={**operands.tables, **made})


def _made(operands: Operands, one: Made, block: Tensor) -> Tensor:
    found = made_rows(operands, one, block)
    return found.double().cumsum(dim=2) if one.running else found


def made_rows(operands: Operands, one: Made, block: Tensor) -> Tensor:
    """What a table holds of each token by itself."""
    real = torch.promote_types(block.dtype, torch.float32)
    device, channels = block.device, block.shape[-1]
    wide = one.weights.mentions(component)
    weights = _weights(operands, one, channels, real)  # [heads, channels, components]
    numbers = block.to(real)[:, None] @ weights  # [batch, heads, tokens, components]
    at = {
        **operands.numbers(),
        **operands.head_coordinates(trailing=2),
        component: torch.arange(weights.shape[-1], device=device),
    }
    arrays = Arrays(at, operands.tables, real, device)
    found = arrays.tensor(arrays.read(one.each, {x: numbers}), Sort.REAL).expand(numbers.shape)
    return found if wide else found[..., 0]


def _weights(operands: Operands, one: Made, channels: int, real: torch.dtype) -> Tensor:
    device = operands.q.device
    (stored,) = (operands.tables[str(node.value)] for node in one.weights.walk() if node.op == "table")
    components = stored.shape[-1] if one.weights.mentions(component) else 1
    at: dict[e.Expr, Tensor | int] = {
        **operands.numbers(),  # type: ignore[dict-item]
        **operands.head_coordinates(trailing=2),  # type: ignore[dict-item]
        channel: torch.arange(channels, device=device)[:, None],
        component: torch.arange(components, device=device),
    }
    arrays = Arrays(at, operands.tables, real, device)
    return arrays.tensor(arrays.read(one.weights), Sort.REAL).expand(operands.q.shape[1], channels, components)
