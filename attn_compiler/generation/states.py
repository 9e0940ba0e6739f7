"""Layers of a transformers cache whose past are states of linear attentions: constant memory, whatever the length."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from attn_compiler.algebra import wire
from attn_compiler.algebra.expr import Sort, b, table, true
from attn_compiler.algebra.expr import k as place
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError
from attn_compiler.generation.remembered import Remembered
from attn_compiler.runtime.attend import in_one_piece
from attn_compiler.runtime.call import operands_of
from attn_compiler.runtime.recall import recall, trait
from attn_compiler.targets.held_past import joined
from attn_compiler.targets.traits import Trait, with_traits

VALID = "attn.valid"  # a table: which of the new tokens are no padding


class StateLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The latest tokens that queries see one by one, if there are any, and states of all before them; to the model, all tokens.

    What stands in the graph for keys that are in the states is an operator that nobody computes: the rewrite finds the states
    there. So do operators for what only the graph knows of new tokens, their traits, which are held as long as keys are.
    """

    is_croppable = False
    tells_rows_apart = True

    def __init__(self, of: Remembered) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of = of
        self.first: Any = None  # the first layer of the cache, from which the model takes how many tokens there are
        self.cumulative_length = 0
        self.states: tuple[Tensor, ...] = ()
        self.traits: tuple[Tensor, ...] = ()  # of the keys that are here, as `of.traits` names them
        self.padding: Tensor | None = None  # tokens before each row's first

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        of, tokens = self.of, key_states.shape[-2]
        # The model's mask counts by the first layer: in a graph, the same number has to be the same symbol.
        before = self.cumulative_length if self.first in (None, self) else self.first.get_seq_length() - tokens
        k, v = _behind(self.keys, key_states), _behind(self.values, value_states)
        new = (trait(key_states, one, one.heads(of.heads)) for one in of.traits)
        traits = tuple(map(_behind, self.traits or (None,) * len(of.traits), new))
        gone, first = k.shape[-2] - of.latest, before + tokens - k.shape[-2]
        if traits and not self.states and (self.is_initialized or tokens == 1):
            # Earlier tokens have traits, of which only `recall` tells; and one token alone shows no mask to be causal.
            self._remember(k[:, :, :0], v[:, :, :0], tuple(x[:, :, :0] for x in traits), first)
        seen = k, v
        if self.states:
            told = tuple(zip(of.traits, traits, strict=True))
            seen = (
                recall(k, key_states, self.states, first, of.latest, of.summed, told),
                recall(v, value_states, self.states, first, of.latest, of.summed, told),
            )
        if gone > 0:
            self._remember(k[:, :, :gone], v[:, :, :gone], tuple(x[:, :, :gone] for x in traits), first)
            # A view would keep the whole prompt alive.
            k, v, *traits = (x[:, :, gone:].contiguous() for x in (k, v, *traits))  # type: ignore[assignment]
        self.keys, self.values, self.traits = (k, v, tuple(traits)) if of.latest else (None, None, ())
        self.cumulative_length = before + tokens
        self.is_initialized = True
        return seen

    def _remember(self, k: Tensor, v: Tensor, traits: tuple[Tensor, ...], first: int) -> None:
        """Let tokens that no query sees any more one by one join the states."""
        of, valid = self.of, None
        if self.padding is not None:
            places = torch.arange(k.shape[-2], device=k.device) + first
            valid = places >= self.padding.to(places.device)[:, None]
        self.states = _joined(
            k, v, self.states, traits, valid,
            tables=dict(of.tables), what=of.what, of=of.traits, heads=of.heads, layer=of.layer, layers=of.layers,
        )  # fmt: skip

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.states, self.traits, self.keys, self.values, self.padding = (), (), None, None, None
        self.cumulative_length, self.is_initialized = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each_row(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each_row(lambda x: x.repeat_interleave(repeats, dim=0))

    def _each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        """Have rows copied, left out or put elsewhere."""
        self.states, self.traits = (tuple(map(change, held)) for held in (self.states, self.traits))
        self.keys, self.values, self.padding = (x if x is None else change(x) for x in (self.keys, self.values, self.padding))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ShapeError(
                f"a state cannot be taken back by {abs(tokens_to_remove)} tokens: use a cache that holds everything, such as "
                "transformers' DynamicCache"
            )


def _behind(held: Tensor | None, new: Tensor) -> Tensor:
    return new if held is None else torch.cat([held, new], dim=2)


@in_one_piece
def _joined(
    k: Tensor,
    v: Tensor,
    past: tuple[Tensor, ...],
    traits: tuple[Tensor, ...],
    valid: Tensor | None = None,
    *,
    tables: dict[str, Tensor],
    what: str,
    of: tuple[Trait, ...],
    heads: int,
    layer: int,
    layers: int,
) -> tuple[Tensor, ...]:
    """The states after these tokens."""
    variant = _read(what)
    given = tables if valid is None else {**tables, VALID: valid}
    shown = true if valid is None else table(VALID, b, place, sort=Sort.BOOL)
    nothing = k.new_empty((k.shape[0], heads, 0, k.shape[3]))
    operands = operands_of(nothing, k, v, Variant(), given, 0, 0, layer, layers, False)
    return joined(*with_traits(operands, variant, of, traits), past, shown)


_read = lru_cache(maxsize=64)(wire.read)
