"""Linear attention token by token: a state goes in, a state comes out, and no more than that is held of the past."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError
from attn_compiler.runtime.attend import in_one_piece
from attn_compiler.runtime.automatic import automatic
from attn_compiler.runtime.call import check_shapes, operands_of
from attn_compiler.runtime.reading import VariantLike, read_variant
from attn_compiler.runtime.targets import TARGETS
from attn_compiler.targets.past import objection, remembered


@in_one_piece
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variant: VariantLike,
    past: Tensor | None = None,
    *,
    position: int = 0,
    tables: Mapping[str, Tensor] | None = None,
    values: Mapping[str, int | float] | None = None,
    layer: int = 0,
    layers: int = 1,
) -> tuple[Tensor, Tensor]:
    """Attend with new tokens, whose `past` is the state that an earlier step returned; the result, and the state after them.

    `position` is that of the first new token, where tables are read by tokens. All that `attend` gives at once, steps of any
    lengths give one after the other. The state takes the place of a cache: its size does not depend on how many tokens there
    were. Differentiable.
    """
    check_shapes(q, k, v)
    if q.shape[2] != k.shape[2]:
        raise ShapeError(f"a step attends with as many queries as new keys; found {q.shape[2]} queries and {k.shape[2]} keys")
    read = variant if isinstance(variant, Variant) else read_variant(
        variant, Variant(), heads=q.shape[1], kv_heads=k.shape[1], q_len=q.shape[2], k_len=k.shape[2], head_dim=q.shape[3],
        values=values, layer=layer, layers=layers,
    )  # fmt: skip
    reason = objection(read)
    if reason:
        raise ShapeError(f"the past of this variant is no state: {reason}")
    operands = operands_of(q, k, v, read, tables or {}, position, position, layer, layers, False)
    target = automatic(operands, read) if past is None else TARGETS["torch"]
    state = remembered(operands, read, past)
    out, _ = target.attend(replace(operands, past=past), read)
    return out, state
