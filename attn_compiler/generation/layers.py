"""Layers of a transformers cache that let go of what no later query sees, and hold the rest in as many bits as a policy says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from attn_compiler.algebra.storage import Held
from attn_compiler.errors import ShapeError
from attn_compiler.generation.grown import decoded, encoded
from attn_compiler.planning.kept import Kept
from attn_compiler.runtime.codes import written
from attn_compiler.runtime.placed import placed


class KeptLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """The latest keys, and the first ones of each row in front of them.

    The model is told that every token is there, so that its mask has a place for each of them; what stands in the graph for
    its keys is an operator that says in which of these places those are that it holds.
    """

    def __init__(self, kept: Kept, held: Held | None, *, suffices: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept, self.suffices = kept, suffices
        self.how = written(held) if held else ""
        self.cumulative_length = 0
        self.places: Tensor | None = None  # where keys stand that are not the latest alone, [1 or batch, held]
        self.padding: Tensor | None = None  # tokens before each row's first
        self.tells_rows_apart = kept.first > 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.cumulative_length
        self.keys = self._behind(self.keys, encoded(key_states, self.how, 0))
        self.values = self._behind(self.values, encoded(value_states, self.how, 1))
        self.cumulative_length += key_states.shape[-2]
        keys, values = (decoded(x, self.how, self.dtype) for x in (self.keys, self.values))
        if self.kept.first:
            self._place(torch.arange(before, self.cumulative_length, device=keys.device)[None])
        places = self.places
        if self.held > self.kept.most:
            self._let_go(self.kept)
        if not before:
            return keys, values
        tokens = self.cumulative_length
        return tuple(placed(x, places, tokens, self.kept, suffices=self.suffices) for x in (keys, values))  # type: ignore[return-value]

    def _behind(self, held: Tensor | None, new: Tensor) -> Tensor:
        return torch.cat([held, new], dim=-2) if self.cumulative_length and held is not None else new

    def _place(self, new: Tensor) -> None:
        self.places = new if self.places is None else torch.cat([self.places, new.expand(self.places.shape[0], -1)], dim=1)

    def _let_go(self, kept: Kept) -> None:
        keys, values, length = self.keys, self.values, self.held
        assert keys is not None
        assert values is not None
        if self.places is None:
            # Copied: a view would keep the whole prompt alive, and its strides would be compiled anew.
            self.keys, self.values = (x[:, :, length - kept.latest :].contiguous() for x in (keys, values))
            return
        near = torch.arange(length - kept.latest, length, device=keys.device)[None]
        chosen = torch.arange(kept.first, device=keys.device)[None]
        if self.padding is not None:  # rows begin one after the other: until its first token is here, a row keeps the latest
            ahead = (self.places < self.padding.to(keys.device)[:, None]).sum(1, keepdim=True)
            chosen = chosen + ahead.clamp(max=length - kept.most)
        chosen = torch.cat([chosen, near.expand(chosen.shape[0], -1)], dim=1)
        self.places = self.places.expand(chosen.shape[0], -1).gather(1, chosen)
        rows = chosen[:, None, :, None].expand(keys.shape[0], keys.shape[1], -1, -1)
        self.keys, self.values = (x.gather(2, rows.expand(-1, -1, -1, x.shape[3])) for x in (keys, values))

    @property
    def held(self) -> int:
        """How many keys are here."""
        return self.keys.shape[-2] if self.keys is not None and self.keys.numel() else 0

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def reset(self) -> None:
        super().reset()
        self.places = self.padding = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(0 if self.keys is None else self.keys.shape[0]).repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)
        self._take_rows(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._take_rows(indices)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._take_rows(beam_idx)

    def _take_rows(self, rows: Tensor) -> None:
        self.padding = None if self.padding is None else self.padding[rows.to(self.padding.device)]
        if self.places is not None and self.places.shape[0] > 1:
            self.places = self.places[rows.to(self.places.device)]

    def crop(self, tokens_to_remove: int) -> None:
        if self.cumulative_length > self.held and tokens_to_remove:
            raise ShapeError(
                f"this cache has let go of {self.cumulative_length - self.held} tokens, so it cannot be taken back by "
                f"{abs(tokens_to_remove)}: use one that holds everything, such as transformers' DynamicCache"
            )
        super().crop(tokens_to_remove)
        self.cumulative_length = self.held
        self.places = None if self.places is None else self.places[:, : self.held]
