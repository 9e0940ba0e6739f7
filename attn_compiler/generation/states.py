"""Layers of a transformers cache whose past is the state of a linear attention: constant memory, whatever the length."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from attn_compiler.algebra import wire
from attn_compiler.algebra.expr import Sort, b, table
from attn_compiler.algebra.expr import k as place
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError
from attn_compiler.generation.remembered import Remembered
from attn_compiler.runtime.attend import in_one_piece
from attn_compiler.runtime.call import operands_of
from attn_compiler.runtime.recall import recall
from attn_compiler.targets.past import remembered

VALID = "attn.valid"  # a table: which of the new tokens are no padding


class StateLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The state of all tokens so far; to the model, these tokens.

    What stands in the graph for keys that are in the state is an operator that nobody computes: the rewrite finds the state
    there.
    """

    is_croppable = False
    tells_rows_apart = True

    def __init__(self, of: Remembered) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of = of
        self.first: Any = None  # the first layer of the cache, from which the model takes how many tokens there are
        self.cumulative_length = 0
        self.past: Tensor | None = None
        self.padding: Tensor | None = None  # tokens before each row's first

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        of, past, tokens = self.of, self.past, key_states.shape[-2]
        # The model's mask counts by the first layer: in a graph, the same number has to be the same symbol.
        before = self.cumulative_length if self.first in (None, self) else self.first.get_seq_length() - tokens
        keys, values = key_states, value_states
        if past is not None:
            keys, values = (recall(x, past, before) for x in (key_states, value_states))
        valid = None
        if self.padding is not None:
            places = torch.arange(tokens, device=key_states.device) + before
            valid = places >= self.padding.to(places.device)[:, None]
        self.past = _joined(
            key_states, value_states, past, valid,
            tables=dict(of.tables), what=of.what, heads=of.heads, layer=of.layer, layers=of.layers,
        )  # fmt: skip
        self.cumulative_length = before + tokens
        self.is_initialized = True
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.past = self.padding = None
        self.cumulative_length, self.is_initialized = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.past = None if self.past is None else self.past[indices.to(self.past.device)]
        self.padding = None if self.padding is None else self.padding[indices.to(self.padding.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.past = None if self.past is None else self.past.repeat_interleave(repeats, dim=0)
        self.padding = None if self.padding is None else self.padding.repeat_interleave(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ShapeError(
                f"a state cannot be taken back by {abs(tokens_to_remove)} tokens: use a cache that holds everything, such as "
                "transformers' DynamicCache"
            )


@in_one_piece
def _joined(
    k: Tensor,
    v: Tensor,
    past: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    tables: dict[str, Tensor],
    what: str,
    heads: int,
    layer: int,
    layers: int,
) -> Tensor:
    """The state after these tokens."""
    variant = _read(what, valid is not None)
    given = tables if valid is None else {**tables, VALID: valid}
    nothing = k.new_empty((k.shape[0], heads, 0, k.shape[3]))
    return remembered(operands_of(nothing, k, v, variant, given, 0, 0, layer, layers, False), variant, past)


@lru_cache(maxsize=64)
def _read(what: str, padded: bool) -> Variant:
    variant = wire.read(what)
    return replace(variant, mask=variant.mask & table(VALID, b, place, sort=Sort.BOOL)) if padded else variant
