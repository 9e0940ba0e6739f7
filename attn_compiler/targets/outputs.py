"""Carries out the steps that a variant takes with its result: by plain operators, behind whatever attended."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra import output as o
from attn_compiler.algebra.expr import Sort
from attn_compiler.algebra.variant import Variant
from attn_compiler.targets.arrays import Arrays, Value
from attn_compiler.targets.local import near
from attn_compiler.targets.operands import Operands


def put_out(out: Tensor, operands: Operands, variant: Variant, real: torch.dtype) -> Tensor:
    """The output [batch, heads, queries, value dim], computed in `real`, from what the heads of a variant attended."""
    for step in variant.output:
        if isinstance(step, o.Local):
            out = out.to(real) + near(operands, variant, step, real)
            continue
        arrays = _arrays(operands, out.shape[-1], real)
        known: dict[e.Expr, Value] = {o.x: out.to(real)}
        if step.mentions(o.mean_square):
            known[o.mean_square] = out.to(real).square().mean(dim=-1, keepdim=True)
        out = arrays.tensor(arrays.read(step, known), Sort.REAL)
    return out


def _arrays(operands: Operands, width: int, real: torch.dtype) -> Arrays:
    """What steps may speak of, with axes [batch, heads, queries, components]."""
    device = operands.q.device
    at: dict[e.Expr, Value] = {
        **operands.numbers(),
        e.b: torch.arange(operands.q.shape[0], device=device)[:, None, None, None],
        e.i: torch.arange(operands.q_len, device=device)[:, None],
        o.component: torch.arange(width, device=device),
        **operands.head_coordinates(trailing=2),
    }
    counted = operands.head_numbers == tuple(range(operands.heads))
    whole = {e.b: 4, e.i: 2, o.component: 1} | ({e.h: 3} if counted else {})
    return Arrays(at, operands.tables, real, device, whole)
