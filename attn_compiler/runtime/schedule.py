"""The schedule of a variant as people write it: a mask text, a mapping of slots, or a Variant."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from attn_compiler.algebra.variant import Variant
from attn_compiler.planning import schedule as planning
from attn_compiler.runtime.reading import VariantLike, read_variant


def schedule(
    variant: VariantLike,
    q_len: int,
    k_len: int,
    *,
    tile: tuple[int, int] = (64, 64),
    heads: int = 1,
    kv_heads: int | None = None,
    tables: Mapping[str, Tensor] | None = None,
    values: Mapping[str, int | float] | None = None,
    layer: int = 0,
    layers: int = 1,
) -> planning.Schedule:
    """Which key tiles each query tile visits, and how. Tables that are given make it sharper."""
    read = read_variant(
        variant, Variant(), heads=heads, kv_heads=kv_heads or heads, q_len=q_len, k_len=k_len, head_dim=64, values=values,
        layer=layer, layers=layers,
    )  # fmt: skip
    given = {name: np.asarray(table.detach().cpu()) for name, table in (tables or {}).items()}
    return planning.schedule(
        read,
        q_len,
        k_len,
        tile=tile,
        heads=heads,
        kv_heads=kv_heads,
        tables=given or None,
        values=values,
        layer=layer,
        layers=layers,
    )
