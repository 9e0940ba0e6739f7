"""Layers of a transformers cache that let go of what no later query sees, and hold the rest in as many bits as a policy says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from attn_compiler.algebra.storage import Held
from attn_compiler.errors import ShapeError
from attn_compiler.generation.kept import Kept
from attn_compiler.runtime.codes import written
from attn_compiler.targets.rows import row_dtype


class KeptLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """The latest keys, and the first ones of each row in front of them.

    The model is told that its keys are the latest tokens. The first ones then stand in the places of others that were let go,
    which are no padding, and so each place of the model's mask fits the key in it.
    """

    def __init__(self, kept: Kept | None, held: Held | None, *, slides: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept, self.is_sliding = kept, slides
        self.held_in, self.how = held, written(held) if held else ""
        self.cumulative_length = 0
        self.padding: Tensor | None = None  # tokens before each row's first

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        gone = self.cumulative_length - self.held
        new_keys, new_values = self._encoded(key_states), self._encoded(value_states)
        keys, values = torch.cat([self.keys, new_keys], dim=-2), torch.cat([self.values, new_values], dim=-2)
        self.cumulative_length += key_states.shape[-2]
        self.keys, self.values = keys, values
        if self.kept is not None and keys.shape[-2] > self.kept.most:
            self._let_go(self.kept, keys, values, gone)
        return self._decoded(keys), self._decoded(values)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        if self.held_in:
            of_rows = key_states.new_empty(0, dtype=row_dtype(self.held_in))
            self.keys, self.values = of_rows, of_rows

    def _encoded(self, x: Tensor) -> Tensor:
        return torch.ops.attn_compiler.encoded(x, self.how) if self.how else x

    def _decoded(self, held: Tensor) -> Tensor:
        """What attention reads: operators that know codes take these instead, and this is then never computed."""
        return torch.ops.attn_compiler.decoded(held, self.how, self.dtype) if self.how else held

    def _let_go(self, kept: Kept, keys: Tensor, values: Tensor, gone: int) -> None:
        first, latest, length = kept.first, kept.latest, keys.shape[-2]
        if not first:
            # Copied: a view would keep the whole prompt alive, and its strides would be compiled anew.
            self.keys, self.values = (x[:, :, length - latest :].contiguous() for x in (keys, values))
            return
        pinned, near = torch.arange(first, device=keys.device), torch.arange(length - latest, length, device=keys.device)
        start = torch.zeros(keys.shape[0], dtype=torch.int64, device=keys.device)
        if self.padding is not None:  # rows begin one after the other: until its first token is here, a row keeps the latest
            start = (self.padding.to(keys.device) - gone).clamp(0, length - first - latest)
        places = torch.cat([start[:, None] + pinned, near.expand(keys.shape[0], -1)], dim=1)[:, None, :, None]
        self.keys, self.values = (x.gather(2, places.expand(-1, x.shape[1], -1, x.shape[3])) for x in (keys, values))

    @property
    def held(self) -> int:
        """How many keys are here."""
        return self.keys.shape[-2] if self.keys is not None and self.keys.numel() else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held + query_length, self.cumulative_length - self.held

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.padding = None if self.padding is None else self.padding.repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.padding = None if self.padding is None else self.padding[indices]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.padding = None if self.padding is None else self.padding[beam_idx.to(self.padding.device)]

    def crop(self, tokens_to_remove: int) -> None:
        if self.cumulative_length > self.held and tokens_to_remove:
            raise ShapeError(
                f"this cache has let go of {self.cumulative_length - self.held} tokens, so it cannot be taken back by "
                f"{abs(tokens_to_remove)}: use one that holds everything, such as transformers' DynamicCache"
            )
        before = self.held
        super().crop(tokens_to_remove)
        self.cumulative_length -= before - self.held
