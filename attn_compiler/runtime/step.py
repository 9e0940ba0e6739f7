"""Attention token by token, where little is held of the past: states of what is linear, and a window's latest tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError, did_you_mean
from attn_compiler.runtime.attend import carried, in_one_piece
from attn_compiler.runtime.call import check_shapes, operands_of
from attn_compiler.runtime.reading import VariantLike, read_variant
from attn_compiler.runtime.targets import TARGETS
from attn_compiler.targets.held_past import joined, latest, objection, states
from attn_compiler.targets.operands import Operands

Target = Literal["auto", "cpp", "torch", "triton"]


class Past(NamedTuple):
    """What a step hands to the next one: the latest keys and values, and a state of all tokens before them for each linear part.

    As long as all tokens are among the latest, there are no states.
    """

    states: tuple[Tensor, ...]
    k: Tensor
    v: Tensor


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variant: VariantLike,
    past: Past | None = None,
    *,
    position: int = 0,
    tables: Mapping[str, Tensor] | None = None,
    values: Mapping[str, int | float] | None = None,
    layer: int = 0,
    layers: int = 1,
    target: Target = "auto",
) -> tuple[Tensor, Past]:
    """Attend with new tokens, whose `past` is what an earlier step returned; the result, and the past of the tokens behind them.

    `position` is that of the first new token, where tables are read by tokens. All that `attend` gives at once, steps of any
    lengths give one after the other. The past takes the place of a cache: a state for each linear part (of a branch, of a
    group of heads), and as many of the latest keys as a window shows, however many tokens there were. Differentiable.
    States are met on PyTorch's operators, or by the kernels of the `target` triton; it, too, joins tokens to them by operators.
    """
    held = None if past is None else (past.states, past.k, past.v)
    out, states, held_k, held_v = _step(
        q, k, v, variant, held, position=position, tables=tables, values=values, layer=layer, layers=layers, target=target
    )
    return out, Past(states, held_k, held_v)


@in_one_piece  # which hands plain tuples in and out: Dynamo cannot put together those that have names
def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variant: VariantLike,
    held: tuple[tuple[Tensor, ...], Tensor, Tensor] | None = None,
    *,
    position: int = 0,
    tables: Mapping[str, Tensor] | None = None,
    values: Mapping[str, int | float] | None = None,
    layer: int = 0,
    layers: int = 1,
    target: str = "auto",
) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor]:
    check_shapes(q, k, v)
    if target not in ("auto", *TARGETS):
        raise ShapeError(f'no target "{target}" takes steps{did_you_mean(target, ("auto", *TARGETS))}')
    if q.shape[2] != k.shape[2]:
        raise ShapeError(f"a step attends with as many queries as new keys; found {q.shape[2]} queries and {k.shape[2]} keys")
    read = read_variant(
        variant, Variant(), heads=q.shape[1], kv_heads=k.shape[1], q_len=q.shape[2], k_len=k.shape[2], head_dim=q.shape[3],
        values=values, layer=layer, layers=layers,
    )  # fmt: skip
    reason = objection(read, q.shape[1])
    if reason:
        raise ShapeError(f"the past of this variant is no state: {reason}")
    before = _checked(None if held is None else Past(*held), read, q, k, v)
    k, v = torch.cat([before.k, k], dim=2), torch.cat([before.v, v], dim=2)
    first = position - before.k.shape[2]
    operands = replace(operands_of(q, k, v, read, tables or {}, position, first, layer, layers, False), past=before.states)
    then = _past(operands, read, before.states)
    out, _ = carried(operands, read, False, target)
    return out, *then


def _past(operands: Operands, variant: Variant, before: tuple[Tensor, ...]) -> Past:
    """What is held once the tokens of a call are there."""
    q, k, v = operands.q, operands.k, operands.v
    gone = k.shape[2] - latest(variant, operands.heads)
    if gone <= 0:
        return Past(before, k, v)
    left = replace(operands, q=q[:, :, :0], k=k[:, :, :gone], v=v[:, :, :gone], past=())
    return Past(joined(left, variant, before), k[:, :, gone:], v[:, :, gone:])


def _checked(past: Past | None, variant: Variant, q: Tensor, k: Tensor, v: Tensor) -> Past:
    """The past of a step, where it is one of this variant; nothing at the start."""
    if past is None:
        return Past((), k[:, :, :0], v[:, :, :0])
    wanted = len(states(variant, q.shape[1])) if past.states else 0
    if len(past.states) != wanted:
        raise ShapeError(
            f"expected a `past` with {wanted} states, as an earlier step with this variant returned it; found {len(past.states)}"
        )
    return past
